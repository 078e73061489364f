"""Causal tracing: equal to its definition, equal to the authors' code, right averages."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import numpy
import pytest
import torch

from conftest import make_lm
from families import CORE_FAMILIES
from reknow import LM, method
from reknow.datasets import Fact
from reknow.errors import InputError
from reknow.model.tokens import Text
from reknow.tracing.causal import (
    TOKEN_CLASSES,
    StoredTrace,
    Trace,
    Tracing,
    average,
    embedding_std,
    measure_restorations,
    trace_facts,
    trace_prompt,
)
from reknow.tracing.restoration import Prompt, RestorationKind, list_restorations

GOLDEN = Path(__file__).parent.parent / "golden"
KINDS = get_args(RestorationKind)


def a_prompt(lm: LM, prompt: str = "The mother tongue of {} is", subject: str = "Peru", samples: int = 3) -> Prompt:
    (row,) = lm.encode([Text.of(prompt, subject)])
    width = lm.parts.hidden_size
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(samples, row.subject_last - row.subject_first + 1, width, generator=generator)
    return Prompt(lm, row, noise)


# Beside the core families: in-place addition and a tuple (falcon), ALiBi over rows × heads (bloom), sliding windows
# and norms behind the MLP (gemma2).
@pytest.mark.parametrize("family", [*CORE_FAMILIES, "falcon", "bloom", "gemma2"])
def test_every_restored_run_equals_a_full_pass(family, monkeypatch):
    monkeypatch.setattr("reknow.tracing.restoration.TOKENS_PER_PASS", 100)  # several batches
    lm = make_lm(family)
    prompt = a_prompt(lm)
    runs = [run for kind in KINDS for run in list_restorations(kind, lm.layers, 2)]
    found = dict(prompt.restored(range(prompt.width), runs))
    assert sorted(found) == list(range(prompt.width))
    for column in (0, prompt.subject[0], prompt.subject[1] - 1, prompt.subject[1], prompt.width - 1):
        wanted = [prompt.run_full_pass(column, run) for run in runs]
        assert found[column] == pytest.approx(wanted, rel=1e-5)
    assert len(set(found[prompt.subject[1] - 1])) > len(runs) / 2  # the runs differ


def test_a_model_whose_blocks_cannot_be_replayed_is_traced_by_full_passes(lm):
    fast = a_prompt(lm)
    runs = list_restorations("mlp", lm.layers, 2)
    quick = list(fast.restored([fast.subject[0]], runs))
    lm.parts = type(lm.parts)(**{**vars(lm.parts), "replayable": False})
    ((column, slow),) = a_prompt(lm).restored([fast.subject[0]], runs)
    assert quick == [(column, pytest.approx(slow, rel=1e-5))]


@pytest.mark.parametrize("settings", [dict(name="grace", epsilon=1e3), dict(name="melo", radius=1e3, span=1)])
def test_a_memory_is_traced_as_it_answers(lm, edit, settings):
    lm.apply(method(**settings, layer=1, steps=3).edit(lm, [edit]))
    prompt = a_prompt(lm)
    runs = list_restorations("hidden", lm.layers, 1)
    ((column, found),) = prompt.restored([prompt.subject[0]], runs)
    assert found == pytest.approx([prompt.run_full_pass(column, run) for run in runs], rel=1e-5)


def test_embeddings_may_be_narrower_than_states():
    lm = make_lm("opt", word_embed_proj_dim=16)
    assert trace_prompt(lm, "{} is", "Peru", 1.0, Tracing(samples=2, kinds=KINDS)).clean > 0


def test_restored_states_mean_what_they_say(lm):
    prompt = a_prompt(lm, "{} is", samples=2)
    last = prompt.width - 1
    table = measure_restorations(prompt, lm.layers, KINDS, 1, range(prompt.width))
    # The output of the last block at the last token is all that the head reads.
    assert float(table["hidden"][last, -1]) == pytest.approx(prompt.probability, rel=1e-5)
    assert table["hidden"][: last - 1, -1].tolist() == pytest.approx(
        [prompt.corrupted_probability] * (last - 1), rel=1e-5
    )
    # Behind the last block nothing is left to sever.
    for kind in ("mlp_severed", "attention_severed"):
        assert torch.allclose(table[kind][:, -1], table["hidden"][:, -1], rtol=1e-5)
        assert not torch.allclose(table[kind][prompt.subject[0], 0], table["hidden"][prompt.subject[0], 0], rtol=1e-3)


def test_hooks_are_gone_and_the_model_is_as_before(lm):
    ids = torch.tensor([[5, 6, 7]])
    before = lm.model(ids).logits
    trace_prompt(lm, "{} is", "Peru", 1.0, Tracing(samples=2, kinds=KINDS))
    assert torch.equal(lm.model(ids).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert not any("forward" in vars(module) for module in lm.model.modules())


def test_windows():
    assert [(run.first, run.last) for run in list_restorations("mlp", 48, 10)][:7] == [
        (0, 4), (0, 5), (0, 6), (0, 7), (0, 8), (0, 9), (1, 10),
    ]  # fmt: skip
    assert [(run.first, run.last) for run in list_restorations("attention", 48, 10)][-1] == (42, 47)
    assert [(run.first, run.last) for run in list_restorations("mlp", 3, 1)] == [(0, 0), (1, 1), (2, 2)]
    assert [(run.first, run.last) for run in list_restorations("mlp", 4, 3)] == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert [Tracing().window_of(layers) for layers in (48, 28, 12, 6, 2)] == [10, 6, 2, 1, 1]


# --- the authors' numbers ------------------------------------------------------------


@pytest.fixture(scope="module")
def authors():
    return json.loads((GOLDEN / "trace.json").read_text()), LM(GOLDEN / "tiny_gpt2", dtype=torch.float32)


@pytest.mark.parametrize("number", range(4))
def test_traces_are_the_authors(authors, number):
    head, lm = authors
    case = head["cases"][number]
    (row,) = lm.encode([Text.of(case["prompt"], case["subject"])])
    first, behind = case["subject_range"]
    assert (row.subject_first, row.subject_last + 1) == (first, behind)
    eighths = numpy.random.RandomState(case["noise_seed"]).randn(head["samples"], behind - first, 32) * 8
    noise = torch.from_numpy(numpy.round(eighths) / 8 * case["noise"]).float()
    prompt = Prompt(lm, row, noise)
    assert lm.tokenizer.decode([prompt.answer]) == case["answer"]
    assert prompt.probability == pytest.approx(case["high"], rel=1e-5)
    assert prompt.corrupted_probability == pytest.approx(case["low"], rel=1e-5)
    for name, wanted in case["scores"].items():
        kind, _, window = name.replace("attn", "attention").partition("/")
        table = measure_restorations(prompt, lm.layers, [kind], int(window or 1), range(len(row.ids)))
        assert torch.allclose(table[kind], torch.tensor(wanted), rtol=1e-4, atol=1e-7), name


def test_the_noise_level_is_the_authors(authors):
    head, lm = authors
    facts = [Fact("{} is", subject, "it") for subject in head["spread"]["subjects"]]
    assert embedding_std(lm, facts) == pytest.approx(head["spread"]["value"], rel=1e-6)


# --- facts and averages ------------------------------------------------------------


def test_only_known_facts_are_traced():
    lm = make_lm("llama")
    # A prompt that the random model continues with a token that can be typed.
    prompts = [f"{number} {{}} is" for number in range(200)]
    words = lm.generate([prompt.replace("{}", "Peru") for prompt in prompts], 1)
    typed = [(prompt, word.strip()) for prompt, word in zip(prompts, words, strict=True) if word.strip().isalpha()]
    prompt, right = next((p, w) for p, w in typed if lm.score([p.replace("{}", "Peru")], [w])[0].correct == (True,))
    facts = [Fact(prompt, "Peru", answer) for answer in (right, "unlikely")]
    (trace,) = trace_facts(lm, facts, Tracing(samples=2, tokens="subject_last"))
    assert trace.answer.strip() == right
    assert trace.prompt == facts[0].text
    assert "".join(trace.tokens[trace.subject[0] : trace.subject[1]]).strip() == "Peru"
    traced = ~trace.restored["mlp"].isnan().any(1)
    assert traced.nonzero().flatten().tolist() == [trace.subject[1] - 1]


def test_the_same_seed_gives_the_same_trace(lm):
    one, two, other = (
        trace_prompt(lm, "{} is", "Peru", 1.0, Tracing(samples=2, kinds=("hidden",), seed=s)) for s in (0, 0, 1)
    )
    assert torch.equal(one.restored["hidden"], two.restored["hidden"])
    assert other.corrupted != one.corrupted


def a_trace(rows: list[float], subject: tuple[int, int], corrupted: float = 0.1) -> Trace:
    table = torch.tensor(rows)[:, None]  # one layer
    tokens = tuple("abcdefgh"[: len(rows)])
    return Trace("a", tokens, subject, "x", 0.9, corrupted, {"hidden": table}, 1)


def test_averages_by_token_class():
    long = a_trace([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9], (1, 5))
    short = a_trace([0.4, 0.2], (0, 1))
    found = average([long, short])
    assert found.facts == 2
    assert found.total == pytest.approx(0.8)
    wanted = [
        (0.1 + 0.3) / 2,  # first subject token: 0.2 and 0.4
        (0.2 + 0.4) / 2,  # middle ones: 0.3 and 0.5 of the first fact alone
        (0.5 + 0.3) / 2,  # last one
        (0.6 + 0.1) / 2,  # the next one, which is the last token of the second fact
        0.7,  # further
        (0.8 + 0.1) / 2,
    ]
    assert found.effects["hidden"][:, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    first = found.errors["hidden"][0, 0]
    assert float(first) == pytest.approx(1.96 * numpy.std([0.1, 0.3], ddof=1) / math.sqrt(2), rel=1e-5)
    assert math.isnan(found.errors["hidden"][1, 0])  # one fact has no spread
    assert found.peak("hidden", TOKEN_CLASSES[2]) == 0


def test_a_subject_that_ends_its_prompt_has_no_subsequent_token():
    found = average([a_trace([0.2, 0.3], (0, 2))])
    assert found.effects["hidden"][:, 0].isnan().tolist() == [False, True, False, True, True, False]


def test_a_trace_survives_json(lm):
    trace = trace_prompt(lm, "{} is", "Peru", 1.0, Tracing(samples=2, tokens="subject_last"))
    again = StoredTrace.model_validate(json.loads(json.dumps(trace.as_json()))).trace()
    assert torch.allclose(again.restored["mlp"], trace.restored["mlp"], atol=1e-6, equal_nan=True)
    assert again.tokens == trace.tokens and again.subject == trace.subject


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: Tracing(samples=0), "samples"),
        (lambda lm: Tracing(noise=0.0), "noise"),
        (lambda lm: Tracing(kinds=("mlps",)), "mlps"),  # type: ignore[arg-type]
        (lambda lm: trace_prompt(lm, "Peru is", "Peru", 1.0), "one {}"),
        (lambda lm: average([]), "traces"),
        (lambda lm: embedding_std(lm, []), "at least one fact"),
    ],
)
def test_bad_input_is_refused(lm, call, message):
    with pytest.raises(InputError, match=message):
        call(lm)
