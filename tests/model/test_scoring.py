"""Logits that are no numbers: an unedited model that gives some is refused, a wrecked one is wrong everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from typer.testing import CliRunner

from conftest import make_lm, some_patch
from families import tiny_model, tiny_tokenizer
from reknow import LM, Case, Edit, Probe, evaluate, method
from reknow.cli import app
from reknow.errors import EditFailed, InputError, ModelError
from reknow.evaluation.effect import observe
from reknow.evaluation.metrics import unchanged
from reknow.model.scoring import NO_TOKEN
from reknow.patching.deltas import LowRank
from reknow.patching.patches import Patch
from reknow.tracing.causal import Tracing, trace_prompt

WIDER = r"gives NaN or infinity: open it with a wider dtype, bfloat16 or float32 \(--dtype\)"
PROMPTS, TARGETS = ["The capital of Peru is", "I know"], ["Lima", "of"]


def untied(family: str = "llama"):
    """A tiny model whose embedding can be spoilt without its head."""
    return tiny_model(family, tie_word_embeddings=False)


def spoil_begin(model, value: float) -> None:
    """What float16 makes of the state of a model's first token, which alone is large."""
    model.get_input_embeddings().weight.data[0] = value


def spoil_word(model, value: float) -> None:
    """Weights that are fine at the ids drawn for the other checks, and not at those of a sentence."""
    (ids,) = tiny_tokenizer()(["capital"])["input_ids"]
    model.get_input_embeddings().weight.data[ids] = value


def spoil_head(model, value: float) -> None:
    model.get_output_embeddings().weight.data[17] = value


def spoil_norm(model, value: float) -> None:
    model.model.norm.weight.data[3] = value


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("spoil", [spoil_begin, spoil_word, spoil_head, spoil_norm])
def test_a_model_without_numbers_is_refused_when_it_is_loaded(spoil, value):
    model = untied()
    spoil(model, value)
    with pytest.raises(ModelError, match=f"float32 {WIDER}"):
        LM((model, tiny_tokenizer(bos=True)))


def loud():
    """A model whose first token has states beyond 65504, the largest number of float16."""
    model = untied()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e4)
        model.get_input_embeddings().weight[0].mul_(10)
    return model


def test_half_precision_that_overflows_on_text_is_refused_and_the_remedy_helps():
    tokenizer = tiny_tokenizer(bos=True)
    with pytest.raises(ModelError, match=f"float16 {WIDER}"):
        LM((loud(), tokenizer), dtype="float16")
    for dtype in ("bfloat16", "float32"):
        lm = LM((loud(), tokenizer), dtype=dtype)
        assert not any(math.isnan(score.nll) for score in lm.score(PROMPTS, TARGETS))


def late(lm: LM) -> None:
    """Spoils a word that the sentence read at load does not have."""
    ids = lm.tokenizer(["Übel"], add_special_tokens=False)["input_ids"][0]
    lm.model.get_input_embeddings().weight.data[ids] = math.nan


def test_a_text_read_later_is_refused_wherever_it_is_read():
    lm = LM((untied(), tiny_tokenizer(bos=True)))
    late(lm)
    asked = Edit("I know {}", subject="Zoë Übel", target_new="of")
    for read in (
        lambda: lm.score(["I know Zoë Übel"], ["of"]),
        lambda: lm.generate("I know Zoë Übel", 2),
        lambda: lm.generate("I know Zoë Übel", 2, top_k=3),
        lambda: lm.perplexity(["Zoë Übel lives in São Paulo"]),
        lambda: observe(lm, [asked]),
        lambda: trace_prompt(lm, "I know {}", "Zoë Übel", 0.1, Tracing(samples=2)),
        lambda: evaluate(lm, [Case(asked, (Probe("I know Zoë Übel", ("of",), "reliability", "r"),))], method("kn")),
    ):
        with pytest.raises(ModelError, match=WIDER):
            read()
    assert lm.score(PROMPTS, TARGETS)[0].rank >= 1  # other texts are read as before
    assert lm.generate(["The capital of Peru is"], 2)[0]


def wrecked(lm: LM) -> Patch:
    """A patch under which the last block overflows in float32, and the logits are NaN."""
    name = lm.parts.value[-1]
    out, inside = lm.base_weight(name).shape
    deltas = {name: LowRank(torch.full((out, 1), 1e19), torch.full((1, inside), 1e19))}
    edit = Edit("The capital of {} is", subject="Peru", target_new="Lima")
    return Patch("rome", {}, (edit,), deltas, lm.fingerprint)


def test_what_a_patch_has_wrecked_is_wrong_and_never_as_before():
    lm = LM((untied(), tiny_tokenizer(bos=True)))
    before = lm.score(PROMPTS, TARGETS)
    with lm.patched(wrecked(lm)):
        for score, text in zip(lm.score(PROMPTS, TARGETS), lm.generate(PROMPTS, 3), strict=True):
            assert math.isnan(score.nll) and not any(score.correct) and text == ""
            assert score.rank == 320 and set(score.top) == {NO_TOKEN}
        assert lm.generate(PROMPTS, 3, top_k=5) == ["", ""]
        assert math.isnan(lm.perplexity(["The capital of Peru is Lima"]))
        after = lm.score(PROMPTS, TARGETS)
        with pytest.raises(InputError, match="take them off"):
            trace_prompt(lm, "The capital of {} is", "Peru", 0.1, Tracing(samples=2))
        with pytest.raises(EditFailed, match="wider dtype, bfloat16 or float32"):
            observe(lm, [Edit("I know {}", subject="Peru", target_new="of")])
    assert not any(unchanged(before[0].top, after[0].top)) and not any(unchanged(after[0].top, after[0].top))
    assert lm.score(PROMPTS, TARGETS) == before


def test_one_wrecked_text_leaves_the_others_of_its_batch_as_they_are():
    lm = LM((untied(), tiny_tokenizer(bos=True)))
    lm.apply(some_patch(lm, size=1e-3))
    alone, said = lm.score(PROMPTS[:1], TARGETS[:1])[0], lm.generate(PROMPTS[:1], 3)
    late(lm)
    fine, spoilt = lm.score([PROMPTS[0], "I know Zoë Übel"], TARGETS)
    assert (fine.correct, fine.rank) == (alone.correct, alone.rank) and fine.nll == pytest.approx(alone.nll, abs=1e-4)
    assert spoilt.rank == 320 and math.isnan(spoilt.nll)
    assert lm.generate([PROMPTS[0], "I know Zoë Übel"], 3) == [*said, ""]


def test_nothing_is_written_for_a_model_that_gives_no_numbers(tmp_path):
    model = untied()
    spoil_begin(model, math.inf)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    asked = ["edit", "The capital of {Peru} is", "Lima", "--model", str(tmp_path / "model"), "--layer", "1"]
    result = CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "p.patch")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "wider dtype" in result.stderr
    assert not (tmp_path / "p.patch").exists()


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ModelError, match=r"token ids below 100, .* the tokenizer that the model was trained with"):
        LM((tiny_model("llama", vocab_size=100), tiny_tokenizer()))
    assert make_lm("llama").layers == 3
