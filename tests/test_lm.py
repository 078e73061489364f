"""Scoring, reading and generating in padded batches give what one row by itself gives, worked out by hand."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import GenerationConfig

import reknow.model.tokens
from conftest import close, make_lm
from families import CORE_FAMILIES, tiny_model, tiny_tokenizer
from reknow import LM
from reknow.errors import InputError, ModelError
from reknow.model import generation
from reknow.model.generation import sample_tokens
from reknow.model.tokens import Text

SHAPES = {
    family: (family, {}) for family in (*CORE_FAMILIES, "bloom", "mpt", "gptj", "gpt_neo", "cohere", "granite")
} | {
    "gemma2": ("gemma2", dict(final_logit_softcapping=2.0)),
    "mistral": ("mistral", dict(sliding_window=3)),
    "gemma3": ("gemma3_text", dict(sliding_window=3)),
    "opt-350m": ("opt", dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "falcon, ALiBi": ("falcon", dict(alibi=True)),
}
PROMPTS = [
    "The capital of Peru is",
    "Paris",
    "Where is the Eiffel Tower ? It is in",
    "The capital of Peru is",
    "The mother tongue of Danielle Darrieux is",
    "The capital of Peru is",
]
TARGETS = ["Lima", "France", "São Paulo", "Apple", "German", "Lima"]


@pytest.fixture(scope="module", params=SHAPES)
def lm(request) -> LM:
    family, changes = SHAPES[request.param]
    return make_lm(family, **changes)


def by_hand(lm: LM, ids: list[int]):
    """Log-probabilities of the next token behind every token of one row without padding. (tokens, vocabulary)"""
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_scores_are_those_of_single_rows(lm):
    for score, prompt, target in zip(lm.score(PROMPTS, TARGETS), PROMPTS, TARGETS, strict=True):
        head = lm.tokenizer(prompt)["input_ids"]
        ids = lm.tokenizer(f"{prompt} {target}")["input_ids"]
        wanted = ids[len(head) :]
        log_probs = by_hand(lm, ids)[len(head) - 1 : -1]
        nll = -sum(float(row[token]) for row, token in zip(log_probs, wanted, strict=True)) / len(wanted)
        assert score.nll == pytest.approx(nll, abs=1e-4)
        assert score.top == tuple(log_probs.argmax(-1).tolist())
        assert score.correct == tuple(a == b for a, b in zip(score.top, wanted, strict=True))


def test_batches_change_nothing(lm, monkeypatch):
    together = lm.score(PROMPTS, TARGETS)
    monkeypatch.setattr(reknow.model.tokens, "TOKENS_PER_BATCH", 1)
    for a, b in zip(lm.score(PROMPTS, TARGETS), together, strict=True):
        assert a.nll == pytest.approx(b.nll, abs=1e-4) and a.top == b.top
    assert lm.score(PROMPTS[::-1], TARGETS[::-1])[0].top == together[-1].top


def test_greedy_generation_is_argmax_step_by_step(lm):
    """Left padding with different lengths, and a cache, against one row at a time without either."""
    prompts = PROMPTS[:3]
    for prompt, text in zip(prompts, lm.generate(prompts, 6), strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        new: list[int] = []
        while len(new) < 6 and lm.tokenizer.eos_token_id not in new:
            new.append(int(by_hand(lm, ids + new)[-1].argmax()))
        assert text == lm.tokenizer.decode(new, skip_special_tokens=True)


def test_texts_are_the_same_in_other_batches(lm, monkeypatch):
    together = lm.generate(PROMPTS, 6)
    monkeypatch.setattr(generation, "MOST_TEXTS", 2)
    assert lm.generate(PROMPTS, 6) == together
    assert [len(part) for part in generation.text_batches(lm, [8, 9, 7, 8, 9])] == [2, 2, 1]


def test_perplexity_is_exp_of_the_mean_nll(lm):
    texts = ["The capital of Peru is Lima .", "Paris", "Beats Music is owned by Apple", "P"]
    nlls = []
    for text in texts:
        ids = lm.tokenizer(text)["input_ids"][:9]
        log_probs = by_hand(lm, ids)
        nlls += [-float(log_probs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
    wanted = float(torch.tensor(nlls).mean().exp())
    assert lm.perplexity(texts, max_tokens=9) == pytest.approx(wanted, rel=1e-4)


def test_reading_gives_the_states_of_single_rows(lm, monkeypatch):
    rows = lm.encode([Text(prompt) for prompt in PROMPTS])
    places = [2, 1, 0, 3, 5, 1]
    value, block = lm.parts.value[1], lm.parts.blocks[0]
    for limit in (4096, 20):
        monkeypatch.setattr(reknow.model.tokens, "TOKENS_PER_BATCH", limit)
        found = lm.read(rows, places, [value], [value, block])
        assert set(found.inputs) == {value} and set(found.outputs) == {value, block}
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            for states, by_name in zip(states_by_hand(lm, row, value, block), found, strict=True):
                for name in by_name:
                    assert close(by_name[name][i], states[name].view(len(row.ids), -1)[place])


def states_by_hand(lm: LM, row, value: str, block: str):
    inputs, outputs = {}, {}

    def keep(_module, args, output):
        # Copies, since Falcon adds attention's output to the MLP's in place.
        inputs[value], outputs[value] = args[0].clone(), output.clone()

    def keep_block(_module, _args, output):
        outputs[block] = (output[0] if isinstance(output, tuple) else output).clone()

    hooks = [
        lm.model.get_submodule(value).register_forward_hook(keep),
        lm.model.get_submodule(block).register_forward_hook(keep_block),
    ]
    by_hand(lm, list(row.ids))
    for hook in hooks:
        hook.remove()
    return inputs, outputs


def test_reading_nothing_gives_nothing(lm):
    assert lm.read([], [], [lm.parts.value[0]]) == ({}, {})
    assert lm.score([], []) == [] and lm.generate([]) == []


@pytest.fixture
def gpt2() -> LM:
    return make_lm("gpt2")


def test_sampling_depends_on_the_seed_alone(gpt2):
    torch.manual_seed(5)
    one = gpt2.generate(PROMPTS, 8, top_k=20, seed=1)
    torch.manual_seed(6)
    assert gpt2.generate(PROMPTS, 8, top_k=20, seed=1) == one
    assert gpt2.generate(PROMPTS, 8, top_k=20, seed=2) != one
    assert len(set(gpt2.generate(["Paris"] * 8, 8, top_k=50, seed=1))) == 8, "rows of a batch differ"


def test_samples_of_one_prompt_differ_between_batches(gpt2, monkeypatch):
    monkeypatch.setattr(reknow.model.tokens, "TOKENS_PER_BATCH", 1)
    monkeypatch.setattr(generation, "CACHE_BYTES", 1)
    assert len(set(gpt2.generate(["Paris"] * 8, 8, top_k=50, seed=1))) == 8


@pytest.mark.parametrize("top_k", [None, 5])
def test_generating_leaves_the_random_state(gpt2, top_k):
    before = torch.get_rng_state()
    gpt2.generate("Paris", 3, top_k=top_k)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "bloom"])
def test_texts_are_those_of_transformers(family):
    lm = make_lm(family)
    prompts = sorted(PROMPTS, key=lambda prompt: len(lm.encode([Text(prompt)])[0].ids))
    batch = lm.pad(lm.encode([Text(prompt) for prompt in prompts]))
    lm.tokenizer.eos_token, lm.model.generation_config = None, GenerationConfig()
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    ids = lm.model.generate(batch.ids, attention_mask=batch.mask, generation_config=settings)
    wanted = lm.tokenizer.batch_decode(ids[:, batch.ids.shape[1] :], skip_special_tokens=True)
    assert lm.generate(prompts, 12) == wanted


def test_samples_follow_the_probabilities():
    logits, count = torch.tensor([0.3, 2.0, -1.0, 1.5, 0.9]), 20_000
    chances = (logits[[1, 3, 4]] / 0.7).softmax(-1)
    drawn = sample_tokens(logits.repeat(count, 1), 3, 0.7, torch.Generator().manual_seed(0)).bincount(minlength=5)
    assert drawn[[0, 2]].tolist() == [0, 0]
    deviation = (count * chances * (1 - chances)).sqrt()
    assert bool(((drawn[[1, 3, 4]] - count * chances).abs() < 3 * deviation).all())


def test_samples_come_from_the_most_likely(gpt2):
    (row,) = gpt2.encode([Text("Paris")])
    most_likely = by_hand(gpt2, list(row.ids))[-1].topk(3).indices.tolist()
    allowed = {gpt2.tokenizer.decode([token], skip_special_tokens=True) for token in most_likely}
    found = set(gpt2.generate(["Paris"] * 60, 1, top_k=3))
    assert found <= allowed and len(found) > 1
    assert gpt2.generate("Paris", 5, top_k=1) == gpt2.generate("Paris", 5)


def test_the_model_s_own_generation_settings_do_not_leak_in(gpt2):
    plain = gpt2.generate(PROMPTS, 12)
    own = gpt2.model.generation_config
    own.repetition_penalty, own.do_sample, own.num_beams, own.min_new_tokens = 5.0, True, 3, 12
    own.no_repeat_ngram_size, own.max_length, own.suppress_tokens = 1, 3, list(range(2, 300))
    assert gpt2.generate(PROMPTS, 12) == plain
    assert gpt2.model.generation_config is own


def test_generation_ends_at_any_end_token(gpt2):
    (row,) = gpt2.encode([Text("Paris")])
    ids = list(row.ids)
    new = [int(by_hand(gpt2, ids)[-1].argmax())]
    new.append(int(by_hand(gpt2, ids + new)[-1].argmax()))
    assert new[0] != new[1]
    gpt2.model.generation_config.eos_token_id = [1, new[1]]
    found = gpt2.generate("Paris", 9)
    assert found == gpt2.tokenizer.decode(new)


def test_a_tokenizer_without_special_tokens():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token = None
    model = tiny_model("gpt2")
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    lm, usual = LM((model, tokenizer)), make_lm("gpt2")
    assert lm.score(PROMPTS, TARGETS) == usual.score(PROMPTS, TARGETS)
    assert [len(t) for t in lm.generate(PROMPTS[:2], 4)] == [len(t) for t in usual.generate(PROMPTS[:2], 4)]
    assert lm.generate("", 4) == lm.generate("\n", 4)  # contexts begin so


@pytest.mark.parametrize("bos", [True, False])
def test_an_empty_prompt_continues_from_the_first_token(bos):
    lm = LM((tiny_model("gpt2"), tiny_tokenizer(bos=bos)))
    first = int(by_hand(lm, [0])[-1].argmax())
    alone, _ = lm.generate(["", "Paris"], 1)
    assert alone == lm.generate("", 1) == lm.tokenizer.decode([first])


def test_texts_longer_than_the_positions_are_refused(gpt2):
    long = "Paris " * 200
    for call in (
        lambda: gpt2.score([long], ["Lima"]),
        lambda: gpt2.generate(long, 2),
        lambda: gpt2.generate("Paris", 128),
    ):
        with pytest.raises(InputError, match="at most 128 tokens"):
            call()
    assert gpt2.perplexity([long], max_tokens=500) == gpt2.perplexity([long], max_tokens=128)
    gpt2.generate("P", 128)  # the last token needs no position
    assert make_lm("bloom").score([long], ["Lima"])


def test_empty_answers_and_texts_are_refused(gpt2):
    with pytest.raises(InputError, match="empty one"):
        gpt2.score(["Paris is"], [""])
    with pytest.raises(InputError, match="write a prompt"):
        gpt2.score([""], ["Lima"])
    with pytest.raises(InputError, match="two tokens"):
        gpt2.perplexity(["P", ""])


def test_one_long_text_is_a_batch_by_itself():
    from reknow.model.tokens import make_batches

    assert make_batches([9000, 3, 4000, 2]) == [[3, 1], [2], [0]]
    parts = make_batches([7] * 1000)
    assert sorted(i for part in parts for i in part) == list(range(1000))
    assert all(7 * len(part) <= reknow.model.tokens.TOKENS_PER_BATCH for part in parts)
    assert make_batches([]) == []
    assert [len(part) for part in make_batches([7] * 1000, at_least=7 * 900)] == [900, 100]


def test_chat_prompts_go_through_the_template():
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.chat_template = (
        "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    model = tiny_model("llama")
    lm, plain = LM((model, tokenizer), chat=True), LM((model, tokenizer))
    assert lm.generate("Paris", 4) == plain.generate("[Paris]:", 4)
    with pytest.raises(ModelError, match="chat template"):
        LM((model, tiny_tokenizer()), chat=True)


def test_dtype_and_device_of_a_pair():
    assert LM((tiny_model("gpt2"), tiny_tokenizer()), dtype="bfloat16").dtype == torch.bfloat16
    assert LM((tiny_model("gpt2"), tiny_tokenizer()), device="cpu").device.type == "cpu"
    with pytest.raises(InputError, match="Known: bfloat16, float16, float32"):
        LM((tiny_model("gpt2"), tiny_tokenizer()), dtype="float15")
    with pytest.raises(InputError, match="device that is there"):
        LM((tiny_model("gpt2"), tiny_tokenizer()), device="nowhere")


def test_a_model_is_loaded_from_a_folder(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
    model.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = LM(str(tmp_path))
    assert lm.dtype == torch.float32, "half precision is slow and coarse on a CPU"
    assert LM(tmp_path, dtype=torch.float16).dtype == torch.float16
    # The tables of rotary angles are not saved and are made anew, in full precision.
    for found, saved in zip(lm.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, saved.float())
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())


def test_what_cannot_be_loaded_is_refused_in_one_sentence(tmp_path):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    nothing, torn, bare = tmp_path / "nothing", tmp_path / "torn", tmp_path / "bare"
    nothing.mkdir()
    model.save_pretrained(bare)
    shutil.copytree(whole, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for source in (nothing, torn, bare, tmp_path / "missing", "no-such-org/no-such-model"):
        with pytest.raises(ModelError, match="could not be loaded") as refusal:
            LM(source)
        assert "\n" not in str(refusal.value) and str(source) in str(refusal.value)
    (whole / "config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded"):
        LM(whole)


def test_a_slow_tokenizer_is_refused(monkeypatch):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ModelError, match="fast tokenizer"):
        LM((tiny_model("gpt2"), tokenizer))


def test_an_unknown_demo_model_is_refused():
    with pytest.raises(InputError, match="unknown demo model"):
        LM.demo("gpt5")


def test_what_is_no_model_is_refused(lm):
    for source, got in ((None, "NoneType"), (lm.model, "LM"), ((lm.model, None), "NoneType")):
        with pytest.raises(InputError, match=rf"pair \(model, tokenizer\) of transformers; got .*{got}"):
            LM(source)


def test_a_text_is_no_list_of_texts(lm):
    for read in (lambda: lm.score("What", "is"), lambda: lm.perplexity("The capital of Peru")):
        with pytest.raises(InputError, match="got one text"):
            read()
    with pytest.raises(InputError, match="got 1 prompts and 2 targets"):
        lm.score(["What"], ["is", "was"])


@pytest.mark.parametrize("wrong", [dict(top_k=0), dict(top_k=5, temperature=0.0), dict(top_k=5, temperature=-1.0)])
def test_nothing_to_draw_from_is_refused(lm, wrong):
    with pytest.raises(InputError, match="expected top_k of at least 1 and a temperature above 0"):
        lm.generate("What", 2, **wrong)
