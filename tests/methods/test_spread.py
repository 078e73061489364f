"""Models whose layers lie on two devices: every method gives them what it gives the whole model.

Run where there are two GPUs, and by `tests/test_twin.py` with the CPU and a second device that stands in for one: an
operation that mixes tensors of both is refused.
"""

from __future__ import annotations

import tempfile
from dataclasses import is_dataclass, replace

import pytest
import torch
from accelerate import dispatch_model
from test_contract import EDIT, OTHER, nll, quick

from conftest import DEVICE, bits, make_lm, same
from families import tiny_model, tiny_tokenizer
from learned import SETTINGS, TRAINING, some_cases, trained
from reknow import LM, METHODS, Case, Patch, Plan, Probe, evaluate, method
from reknow.datasets import load_facts
from reknow.evaluation.effect import observe
from reknow.evaluation.extraction import extract
from reknow.evaluation.soundness import measure
from reknow.tracing.causal import Tracing, embedding_std, trace_prompt

PLACES = ("cpu", "twin:0") if DEVICE == "twin" else ("cuda:0", "cuda:1")
ORDERS = {"forwards": PLACES, "backwards": PLACES[::-1]}
"""Where the texts and the first block are, and where the other blocks. What is left on the CPU or on the device of
the texts by mistake is found in one of the two."""

pytestmark = [
    pytest.mark.contract,
    pytest.mark.skipif(
        DEVICE != "twin" and torch.cuda.device_count() < 2, reason="two devices are needed; test_twin.py has a second"
    ),
]


def spread(family: str, first: str, second: str) -> LM:
    """The tiny model with its embeddings and first block on one device, the other blocks on the second; what follows
    them is there too, but a head that is the embedding."""
    model, blocks = tiny_model(family), make_lm(family).parts.blocks
    places = {block: second if i else first for i, block in enumerate(blocks)}
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not name.startswith(blocks):
            early = isinstance(module, torch.nn.Embedding) or getattr(module, "weight", None) is embedding.weight
            places[name] = first if early else second
    main = "cpu" if "cpu" in (first, second) else first  # else what is on the CPU would be moved at every call
    model = dispatch_model(model, places, main_device=main, force_hooks=True)
    return LM((model, tiny_tokenizer(bos=family == "llama")))


@pytest.fixture(scope="module")
def whole() -> LM:
    return make_lm("llama") if DEVICE != "twin" else LM((tiny_model("llama"), tiny_tokenizer(bos=True)), device="cpu")


@pytest.fixture(scope="module", params=ORDERS)
def lm(request) -> LM:
    made = spread("llama", *ORDERS[request.param])
    assert made.device != made.device_of(made.parts.value[-1])
    return made


def test_the_parts_are_those_of_the_whole(lm, whole):
    assert replace(lm.parts, packable=False) == replace(whole.parts, packable=False) and lm.parts.replayable
    assert lm.fingerprint.digest == whole.fingerprint.digest


@pytest.mark.parametrize("name", METHODS)
def test_methods_give_it_what_they_give_the_whole(name, lm, whole, tmp_path, monkeypatch):
    if name == "ke" and lm.device.type == "twin":
        pytest.skip("its network is one operation to torch, which knows no tensors made in Python")
    monkeypatch.setattr("conftest.DEVICE", str(whole.device))  # where its editor is trained
    before, found = bits(lm), []
    for each in (lm, whole):
        first = quick(name, each).edit(each, [EDIT, OTHER])
        loaded = Patch.load(first.save(tmp_path / f"{len(found)}.patch"))
        assert loaded.id == first.id
        with each.patched(loaded):
            second = quick(name, each).edit(each, [EDIT])  # on top: what is in memory and what is from a file
            with each.patched(second):
                found.append((nll(each, EDIT), nll(each, OTHER), each.generate(EDIT.text, 3)))
    assert same(bits(lm), before) and lm.patches == ()
    (*ours, said), (*theirs, wanted) = found
    if name == "adalora":  # it shares out ranks by comparing numbers that rounding tells apart
        assert max(ours) < 1
        return
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3) and said == wanted


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_other_families(family):
    for order in ORDERS.values():
        lm, whole = spread(family, *order), make_lm(family)
        for name in ("rome", "alphaedit", "grace", "ft-m"):
            with (
                lm.patched(quick(name, lm).edit(lm, [EDIT])),
                whole.patched(quick(name, whole).edit(whole, [EDIT])),
            ):
                assert nll(lm, EDIT) == pytest.approx(nll(whole, EDIT), rel=1e-3, abs=1e-3)


COSTS = ("seconds", "peak_memory_mb")


def flat(value) -> list:
    """The numbers and texts in nested values, without what each of them costs."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return [each for key, inside in value.items() if key not in COSTS for each in flat(inside)]
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [each for inside in value for each in flat(inside)] if isinstance(value, (list, tuple)) else [value]


MEASURED = {
    "rows": lambda lm: (
        evaluate(lm, [Case(EDIT, PROBES), Case(OTHER, PROBES)], quick("grace", lm), Plan("batch")).rows
    ),
    "trace": lambda lm: trace_prompt(lm, "I know {}", "Danielle Darrieux", 1.0, Tracing(samples=2)),
    "severed": lambda lm: trace_prompt(lm, "Who is {}", "Zoë Übel", 1.0, Tracing(1, kinds=("mlp_severed",))),
    "noise": lambda lm: embedding_std(lm, load_facts("known_1000", limit=3)),
    "health": lambda lm: measure(lm, facts=4),
    "effect": lambda lm: observe(lm, [EDIT]),
    "extraction": lambda lm: extract(lm, EDIT, "of", [("paraphrase", "Who knows Danielle Darrieux")]),
}
PROBES = (Probe("Is it", ("of",), "locality", "n"), Probe("Tell me of Zoë Übel", ("in",), "generalization", "p"))


@pytest.mark.parametrize("what", MEASURED)
def test_what_is_measured_is_what_is_measured_of_the_whole(what, lm, whole):
    found = []
    for each in (lm, whole):
        with each.patched(quick("rome", each).edit(each, [EDIT])):
            found.append(flat(MEASURED[what](each)))
    ours, theirs = found
    assert len(ours) > 0 and len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one == (pytest.approx(other, rel=2e-2, abs=1e-3, nan_ok=True) if isinstance(other, float) else other)


@pytest.mark.parametrize("name", ["mend", "malmen", "serac", "instructedit", "ke"])
def test_editors_are_trained_on_it(name, lm, whole):
    if name == "ke" and DEVICE == "twin":
        pytest.skip("its network is one operation to torch, which knows no tensors made in Python")
    trained("instructedit", "llama")  # whose task families its settings name from then on
    cases = [replace(case, edit=replace(case.edit, rephrasings=("Tell me of {}",))) for case in some_cases(24)]
    found = []
    for each in (lm, whole):
        fitted = method(name, **SETTINGS[name]).fit(each, cases, tempfile.mkdtemp(), replace(TRAINING, steps=4))
        with each.patched(fitted.edit(each, [EDIT])):
            found.append(nll(each, EDIT))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
