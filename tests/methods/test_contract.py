"""What every method in the table promises, on every shape of decoder."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import tempfile
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from conftest import alone, bits, make_lm, random_states, same
from families import CORE_FAMILIES, slow_but
from learned import is_learned, trained
from reknow import IKE, LM, METHODS, ROME, Case, Edit, Patch, Probe, method
from reknow.contract import check_edits
from reknow.editing.search import ValueSearchMethod
from reknow.errors import EditFailed, EditRefused, InputError, ModelError, ReknowError
from reknow.memories.base import MemoryMethod
from reknow.methods import Method
from reknow.progress import Stage, progress
from reknow.registry import NEED_A_SUBJECT

pytestmark = pytest.mark.contract

FAMILIES = (*CORE_FAMILIES, "gemma2", "olmoe")
"""With one whose additions do not reach the block's output as they are, and a mixture of experts."""
SHAPES = slow_but(("llama",), FAMILIES)
"""All of them. Those that are slow ask the same of what the fast one has too, or what tests of `editing` and `model`
ask: matrices as (in, out), no gate, parallel blocks, norms behind, experts."""
REFUSED = {
    ("calinet", "olmoe"): "is a mixture of experts, which are fused",
    ("anyedit-memit", "gemma2"): "a norm or a multiplier stands between: take anyedit or ft-uke",
}
"""(method, family) → part of the sentence that says why it is none for the other."""
RATES = {"FT": 2e-2, "LoRA": 5e-2, "ICE": 2e-2}
"""Small models need long strides, and no bound on them."""
EDIT = Edit("I know {}", subject="Danielle Darrieux", target_new="of")
"""The subject stands at the end, where it can steer even a random model, and the answer is one token."""
OTHER = Edit("Who is {}", subject="Zoë Übel", target_new="in")


def quick(name: str, lm: LM, **changes) -> Method:
    """The method with settings that take a fraction of a second."""
    if name == "qlora" and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    if is_learned(name):
        return trained(name, lm.model.config.model_type)
    kind = METHODS[name].method
    if kind is IKE:
        changes = dict(cases=demonstrations(), answer_tokens=20) | changes
    last = lm.layers - 1
    settings = dict(layer=last, layers=(last - 1, last), steps=25, context_groups=((2, 3),), covariance_tokens=200)
    if kind.__name__ in RATES:
        settings |= dict(learning_rate=0.3 if name == "adalora" else RATES[kind.__name__], clamp=None)
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if "chunk_tokens" in known:  # a state in the last layer counts for one token
        settings |= dict(end_token=False)
    if "base_settings" in known:  # of the method that it wraps
        inner = {"layer": last, "steps": 25, "context_groups": [[2, 3]], "covariance_tokens": 200}
        settings |= dict(base_settings=json.dumps(inner))
    return method(name, **{key: value for key, value in (settings | changes).items() if key in known})


@cache
def demonstrations() -> str:
    """A file of a few short cases for IKE, which would else read half of CounterFact."""
    probes = (Probe("Is it", ("of",), "generalization", "p"), Probe("Who is", ("in",), "locality", "n"))
    cases = [Case(replace(EDIT, subject=name), probes) for name in ("Lima", "Peru", "Apple")]
    path = IKE().fit(make_lm(), cases, Path(tempfile.mkdtemp()) / "cases.jsonl").cases
    assert path is not None
    return path


@pytest.fixture(scope="module")
def models():
    """One model per family; the contract is that every test leaves it as it was."""
    made = {family: make_lm(family) for family in FAMILIES}
    before = {family: bits(lm) for family, lm in made.items()}
    yield made
    for family, lm in made.items():
        assert lm.patches == () and same(bits(lm), before[family])


@pytest.fixture(params=METHODS)
def name(request) -> str:
    return request.param


FIRST = {entry.method: name for name, entry in reversed(METHODS.items())}.values()
"""Of the rows that a file makes by other settings the first: what `make test-fast` asks where those do not matter."""


@pytest.fixture(params=slow_but(FIRST, METHODS))
def kind(request) -> str:
    return request.param


def answers(lm: LM) -> tuple:
    """What the model says, through any memory: scores and texts."""
    prompts = [EDIT.text, OTHER.text, "The capital of Peru is"]
    return lm.score(prompts, ["of", "in France", "Lima"]), lm.generate(prompts, 3)


def in_memory(name: str) -> bool:
    return issubclass(METHODS[name].method, MemoryMethod)


def nll(lm: LM, edit: Edit) -> float:
    return lm.score([edit.text], [edit.target_new])[0].nll


@pytest.mark.parametrize("family", SHAPES)
def test_contract(models, name, family, tmp_path):
    lm = models[family]
    if why := REFUSED.get((name, family)):
        with pytest.raises(ModelError, match=why):
            quick(name, lm).edit(lm, [EDIT])
        return
    editor, before, plain, answer = quick(name, lm), bits(lm), answers(lm), nll(lm, EDIT)
    torch.manual_seed(7)
    states = random_states()
    patch = editor.edit(lm, [EDIT])

    assert same(bits(lm), before) and lm.patches == (), "edit() leaves the model as it was"
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters()) and not lm.model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules()), "no hook is left behind"
    assert all(map(torch.equal, random_states(), states)), "torch's random state is the caller's"
    assert patch.method == editor.name == name and patch.edits == (EDIT,) and patch.made_on == ()
    assert (patch.kind == "weights") == bool(patch.deltas) != in_memory(name) and patch.version
    for matrix, delta in patch.deltas.items():
        assert delta.shape == tuple(lm.weight(matrix).shape) and math.isfinite(delta.norm())

    again = method(patch.method, **json.loads(json.dumps(patch.settings)))
    assert again == editor and hash(again) == hash(editor)
    torch.manual_seed(8)
    assert again.edit(lm, [EDIT]).id == patch.id, "same settings, same patch, whatever torch's random state"

    lm.apply(patch)
    try:
        edited, said = bits(lm), answers(lm)
        assert same(edited, before) == in_memory(name) and said != plain
        if not editor.needs_knowledge:
            assert nll(lm, EDIT) < answer - 1, "the answer gains more than a factor of e"
    finally:
        lm.revert(patch)
    assert same(bits(lm), before) and answers(lm) == plain, "taken off, the base's bits are back"

    loaded = Patch.load(patch.save(tmp_path / "one.patch"))
    assert loaded.id == patch.id
    with lm.patched(loaded):
        assert same(bits(lm), edited) and answers(lm) == said


def test_an_edit_says_how_far_it_is(models, kind):
    lm, heard = models["llama"], dict[Stage, list[float]]()
    editor = quick(kind, lm)
    with progress.reported_to(lambda stage: heard.setdefault(stage, []).append(stage.done)):
        editor.edit(lm, [EDIT, OTHER])
    own, *inside = heard
    counted = {stage: done for stage, done in heard.items() if stage.total}
    assert own.what == kind and all(stage.path[0] is own for stage in inside)
    assert counted, "something that takes long is counted"
    for stage, done in counted.items():
        assert done == sorted(done) and done[-1] == stage.total, f"{stage} goes forwards, and to its end"


def test_two_edits_in_one_call(models, name):
    lm = models["llama"]
    before = [nll(lm, edit) for edit in (EDIT, OTHER)]
    editor = quick(name, lm)
    patch = editor.edit(lm, [EDIT, OTHER])
    assert patch.edits == (EDIT, OTHER)
    with lm.patched(patch):
        after = [nll(lm, edit) for edit in (EDIT, OTHER)]
    if not editor.needs_knowledge:
        assert all(a < b - 0.5 for a, b in zip(after, before, strict=True)), (before, after)


def test_edits_made_side_by_side_are_those_made_alone(models, kind):
    """`edit_each` gives a patch per edit, each what `edit` makes of it; they may contradict each other."""
    lm, other = models["llama"], replace(EDIT, target_new="in")
    if (edited := quick(kind, lm)).edits_per_call == 1:
        pytest.skip("computes one edit at a time")
    patches = edited.edit_each(lm, [EDIT, OTHER, other])
    for edit, patch in zip([EDIT, OTHER, other], patches, strict=True):
        alone_patch = edited.edit(lm, [edit])
        assert patch.edits == (edit,) and list(patch.deltas) == list(alone_patch.deltas)
        for matrix, delta in patch.deltas.items():
            whole = alone_patch.deltas[matrix].dense()
            assert (delta.dense() - whole).norm() <= 1e-2 * whole.norm()


def test_an_edit_on_top_of_another(models, name):
    lm = models["gpt_neox"]
    editor = quick(name, lm)
    first = editor.edit(lm, [OTHER])
    with lm.patched(first):
        edited = bits(lm)
        second = editor.edit(lm, [EDIT])
        assert same(bits(lm), edited) and lm.patches == (first,)
        assert second.made_on == (first.id,)
        answer = nll(lm, EDIT)
        with lm.patched(second):
            if not editor.needs_knowledge:
                assert nll(lm, EDIT) < answer - 0.5


@pytest.mark.parametrize("family", SHAPES)
def test_memories_generate_as_they_score(models, name, family):
    """With the key/value cache and left padding: what each prompt gives alone, and what is likeliest when scored."""
    if getattr(METHODS[name].method, "kind", None) != "hook":
        pytest.skip("the model itself answers as ever, or to another prompt")
    if (name, family) in REFUSED:
        pytest.skip("it says why it cannot")
    lm = models[family]
    prompts = [EDIT.text, "Where is the Eiffel Tower ? It is in Paris , France . " + OTHER.text, "Peru"]
    with lm.patched(quick(name, lm).edit(lm, [EDIT, OTHER])):
        together = lm.generate(prompts, 5)
        assert together == [lm.generate(prompt, 5) for prompt in prompts]
        for prompt, text in zip(prompts, together, strict=True):
            ids = alone(lm, prompt, 5)
            assert text == lm.tokenizer.decode(ids, skip_special_tokens=True)
            assert lm.score([prompt], ["of"])[0].top[0] == ids[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision(kind, dtype):
    lm = make_lm("llama", dtype=dtype)
    editor, before, answer = quick(kind, lm), bits(lm), nll(lm, EDIT)
    patch = editor.edit(lm, [EDIT])
    assert same(bits(lm), before)
    with lm.patched(patch):
        if not editor.needs_knowledge:
            assert nll(lm, EDIT) < answer - 0.5
    assert same(bits(lm), before)


def test_bad_requests_are_refused_at_the_door(models, name):
    lm = models["llama"]
    editor = quick(name, lm)
    with pytest.raises(InputError, match="at least one edit"):
        editor.edit(lm, [])
    opposite = Edit(EDIT.prompt, subject=EDIT.subject, target_new="in")
    with pytest.raises(InputError, match="edits that agree"):
        editor.edit(lm, [EDIT, OTHER, opposite])
    long = Edit("I know {}", subject="Danielle Darrieux " * lm.max_tokens, target_new="of")
    with pytest.raises(InputError, match=f"at most {lm.max_tokens} tokens"):
        editor.edit(lm, [long])
    with pytest.raises(InputError, match="setting of"):
        method(name, no_such_setting=1)


def test_an_edit_without_a_subject_is_made_or_refused_before_the_model_is_there(models, name):
    lm = models["llama"]
    bare, editor = Edit("The capital of Peru is", target_new="of"), quick(name, lm)
    try:
        check_edits(editor, bare)
    except EditRefused as refused:
        assert "needs a subject" in str(refused) and refused.edit == bare
        with pytest.raises(EditRefused, match="needs a subject"):
            editor.edit(lm, [bare])
    else:
        assert editor.edit(lm, [bare]).edits == (bare,)


def test_an_edit_that_contradicts_the_memory_replaces_what_is_stored_or_is_refused(models, name):
    if not in_memory(name):
        pytest.skip("weights hold no edits")
    lm = models["llama"]
    editor, opposite = quick(name, lm), replace(EDIT, target_new="in")
    assert isinstance(editor, MemoryMethod)
    refusing = type(editor)(**vars(editor) | {"conflict": "refuse"})
    with lm.patched(editor.edit(lm, [EDIT, OTHER])):
        with pytest.raises(EditRefused, match="is stored as 'of', got 'in': rebuild without the old edit"):
            refusing.edit(lm, [opposite])
        assert refusing.edit(lm, [EDIT]).notes["conflicts"] == []
        update = editor.edit(lm, [opposite])
        assert update.notes["conflicts"] == [{"prompt": EDIT.text, "old": "of", "new": "in"}]
        before = nll(lm, opposite)
        with lm.patched(update):
            if not editor.needs_knowledge:
                assert nll(lm, opposite) < before - 0.5


GONE, NONE = "layer from 0 to 2", "layers? as .*int"


@pytest.mark.parametrize(("layer", "wrong"), [(-1, GONE), (3, GONE), ("1", NONE)])
def test_layers_that_are_not_there_are_refused(models, name, layer, wrong):
    lm = models["llama"]
    known = {field.name for field in fields(METHODS[name].method)}  # type: ignore[arg-type]
    if not known & {"layer", "layers"} or is_learned(name):
        pytest.skip("this method chooses its matrices itself, or did so when it was trained")
    changes = dict(layer=layer, layers=(layer,), context_groups=())
    with pytest.raises(InputError, match=wrong):
        quick(name, lm, **changes).edit(lm, [EDIT])
    for layers, wrong in ((1, "put it in brackets"), ((), "empty list")) if "layers" in known else ():
        with pytest.raises(InputError, match=wrong):
            quick(name, lm, layers=layers).edit(lm, [EDIT])


COUNTS = {"steps", "context_batches", "turn", "batch_size", "block_size", "shard_size", "span", "slots",
          "unrelated_facts", "answer_tokens", "samples", "sample_tokens", "sample_every", "top_k", "candidates",
          "pooling_queries", "max_questions"}  # fmt: skip


def test_counts_below_one_are_refused(name):
    for count in COUNTS & {field.name for field in fields(METHODS[name].method)}:  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"expected {count} of at least 1; got 0"):
            method(name, **{count: 0})


def test_searches_refuse_rates_below_zero_and_what_is_no_probability():
    searches = tuple(name for name, entry in METHODS.items() if issubclass(entry.method, ValueSearchMethod))
    assert tuple(sorted((*searches, "simie"))) == NEED_A_SUBJECT  # which wraps ROME
    for name in searches:
        for field in ("kl_weight", "weight_decay", "min_delta"):
            with pytest.raises(InputError, match=f"expected {field} of at least 0; got -1"):
                method(name, **{field: -1})
        none = 0 if METHODS[name].method is ROME else 1  # without C there is ROME alone
        with pytest.raises(InputError, match=f"expected covariance_tokens of at least {none}; got {none - 1}"):
            method(name, covariance_tokens=none - 1)
        for wrong in (-1, 0):
            for field in ("learning_rate", "clamp"):
                with pytest.raises(InputError, match=f"expected {field} above 0; got {wrong}"):
                    method(name, **{field: wrong})
        for wrong in (-0.1, 2.0, torch.nan):
            with pytest.raises(InputError, match="expected stop_probability from 0 to 1; got"):
                method(name, stop_probability=wrong)


def test_weights_that_broke_give_no_patch(kind):
    """NaN in the model: an error of the library, no patch, and the model as it was found.

    A method that reads logits meets no numbers there and says so of the model, others of what they computed. A patch
    that nothing of the broken matrix went into is the one of the whole model.
    """
    lm = make_lm("gpt2")
    lm.fingerprint  # noqa: B018, taken while the model was whole
    editor = quick(kind, lm)
    lm.weight(lm.parts.value[1])[0, 0] = torch.nan
    before = bits(lm)
    try:
        assert editor.edit(lm, [EDIT]).id == editor.edit(make_lm("gpt2"), [EDIT]).id
    except ReknowError as failure:
        assert isinstance(failure, (EditFailed, InputError, ModelError)), failure
    assert same(bits(lm), before) and lm.patches == ()


def test_the_table_names_what_it_makes():
    for name, entry in METHODS.items():
        if name != "qlora":
            made = method(name)
            assert made.name == name and type(made) is entry.method
        published = bool(re.search(r"\b(19|20)\d\d\b", entry.paper))  # one that has a year has an address
        address = ("arXiv" in entry.paper, "OpenReview" in entry.paper, "doi" in entry.paper.lower())
        assert published == any(address) and entry.paper
    with pytest.raises(InputError, match="Did you mean 'rome'"):
        method("rmoe")
    with pytest.raises(InputError, match="Did you mean 'steps'"):
        method("rome", step=3)
