"""Threads on one model, and interrupts at any moment: answers are right, and the model is what its patches say."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from conftest import bits, make_lm, same, some_patch
from reknow import FT, GRACE, KN, LM, ROME, Edit, LoRA, Patch
from reknow.errors import PatchError
from reknow.model.tokens import Text
from reknow.patching.deltas import Dense
from reknow.patching.memory import Hooks

swallowed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""An interrupt may come while Python throws a generator away, and is lost there."""

THREADS = 4
PROMPTS = ["The capital of Peru is", "I know Danielle Darrieux", "Who is Zoë Übel ? She is", "Beats Music"]
ANSWERS = ["Lima", "of", "and", "Apple"]
FACTS = [
    Edit(f"{start} lives {{}}", subject="in", target_new=answer)
    for start, answer in zip(PROMPTS, ANSWERS, strict=True)
]


def in_threads(work: Iterable[Callable[[], object]]) -> list:
    """What the calls give, made by four threads that begin together."""
    with ThreadPoolExecutor(THREADS, initializer=threading.Barrier(THREADS).wait) as pool:
        return list(pool.map(lambda call: call(), work))


def at_rest(lm: LM) -> dict[str, tuple]:
    """Per module the number of its hooks and whether something stands in place of its `forward`."""
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in lm.model.named_modules()
    }


def grace(lm: LM) -> Patch:
    return GRACE(layer=1, steps=3).edit(lm, FACTS[:2])


def test_scores_of_patched_models_are_those_of_each_patch(lm):
    patches, base = [some_patch(lm, seed, size=3.0) for seed in range(THREADS)], bits(lm)

    def scored(patch: Patch):
        with lm.patched(patch):
            return lm.score(PROMPTS, ANSWERS)

    wanted = [scored(patch) for patch in patches]
    assert len({repr(scores) for scores in wanted}) == THREADS
    assert in_threads([lambda p=p: scored(p) for p in patches * 6]) == wanted * 6
    assert lm.patches == () and same(bits(lm), base)


@pytest.mark.parametrize("edited", [False, True])
def test_readers_do_not_disturb_each_other(lm, edited):
    """Batches of other sizes, readings of modules, texts that are written and drawn: with a memory, and without."""
    if edited:
        lm.apply(grace(lm))
    before, state = at_rest(lm), torch.random.get_rng_state()
    rows = lm.encode([Text("Where is the Eiffel Tower ?"), Text("Peru")])
    name = lm.parts.value[1]
    work = [
        lambda: lm.score(PROMPTS, ANSWERS),
        lambda: lm.score(PROMPTS[:1], ANSWERS[:1]),
        lambda: lm.read(rows, [2, 0], inputs=[name], outputs=[name]).inputs[name].tolist(),
        lambda: lm.generate(PROMPTS[:3], 6),
        lambda: lm.generate(PROMPTS, 5, top_k=5, seed=3),
        lambda: lm.perplexity(PROMPTS),
    ]
    wanted = [call() for call in work]
    assert in_threads(work * 4) == wanted * 4
    assert at_rest(lm) == before and torch.equal(torch.random.get_rng_state(), state)


def test_the_model_by_itself_reads_beside_a_memory_in_threads(lm):
    """Other programs call `lm.model` itself, which no lock guards: each thread has its own pass."""
    lm.apply(grace(lm))
    texts = [
        torch.tensor([row.ids])
        for row in lm.encode([Text(text) for text in (FACTS[0].text, FACTS[1].text, *PROMPTS)])
    ]

    def read(ids: torch.Tensor):
        with torch.no_grad():
            return lm.model(input_ids=ids).logits.tolist()

    wanted = [read(ids) for ids in texts]
    assert in_threads([lambda ids=ids: read(ids) for ids in texts * 5]) == wanted * 5


def test_edits_in_threads_are_the_same_patches(lm):
    methods = [
        ROME(layer=1, steps=3, covariance_tokens=200, context_groups=((1, 2),)),
        FT(layer=1, steps=3),
        GRACE(layer=1, steps=3),
        KN(erase=True, steps=3, threshold=0.0, prompt_share=0.0),
        LoRA(layers=(1,), steps=3),
    ]
    before, at = bits(lm), at_rest(lm)
    wanted = [method.edit(lm, FACTS[:1]).id for method in methods]
    work = [lambda method=method: method.edit(lm, FACTS[:1]).id for method in methods]
    reading = [lambda: lm.score(PROMPTS, ANSWERS)] * 5
    scores = lm.score(PROMPTS, ANSWERS)
    found = in_threads([call for pair in zip(work * 2, reading * 2, strict=True) for call in pair])
    assert found[::2] == wanted * 2 and all(each == scores for each in found[1::2])
    assert same(bits(lm), before) and at_rest(lm) == at


def test_two_wrappers_of_one_model_share_its_lock(lm):
    other = LM((lm.model, lm.tokenizer))
    patch, wanted = some_patch(lm, size=3.0), other.score(PROMPTS, ANSWERS)
    opened, read = threading.Event(), []

    def reader():
        opened.wait()
        read.append(other.score(PROMPTS, ANSWERS))

    thread = threading.Thread(target=reader)
    thread.start()
    with lm.patched(patch):
        opened.set()
        thread.join(0.2)  # it waits
        assert read == [] and lm.score(PROMPTS, ANSWERS) != wanted
    thread.join()
    assert read == [wanted]


# --- interrupts ----------------------------------------------------------------------------------------------


class Interrupt:
    """Raises KeyboardInterrupt at the number-th place where Python looks for signals: a function begins, C ends."""

    def __init__(self, number: int | None):
        self.left, self.seen = number, 0

    def __call__(self, _frame, event: str, _argument) -> None:
        if event in ("call", "c_return"):
            self.seen += 1
            if self.seen == self.left:
                raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_error):
        sys.setprofile(None)


def interrupted(number: int | None, operation: Callable[[], object]) -> int:
    """Makes the call and interrupts it there; how many places it has."""
    try:
        with Interrupt(number) as places:
            operation()
    except KeyboardInterrupt:
        pass
    return places.seen


def put_on(lm, patches):
    lm.apply(patches[0])


def put_on_second(lm, patches):
    lm.apply(patches[1])


def taken_off(lm, patches):
    lm.revert(patches[0])


def for_a_while(lm, patches):
    with lm.patched(*patches[1:]):
        lm.score(PROMPTS[:1], ANSWERS[:1])


def bare(lm, _patches):
    with lm.unpatched():
        lm.generate("Peru", 2)


OPERATIONS = {  # operation → how many of the patches are on before
    put_on: 0, put_on_second: 1, taken_off: 1, for_a_while: 1, bare: 2,
}  # fmt: skip


@swallowed
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", ["weights", "memory"])
def test_an_interrupt_leaves_the_model_that_its_patches_say(kind, operation):
    lm = make_lm("gpt2")
    first = some_patch(lm, 1, layers=(0, 1, 2)) if kind == "weights" else grace(lm)
    with lm.patched(first):
        patches = [first, some_patch(lm, 2, layers=(1, 2), made_on=(first.id,)) if kind == "weights" else grace(lm)]
    states = {}
    for count in range(3):
        with lm.stacked(patches[:count]):
            states[lm.patches] = bits(lm), at_rest(lm), lm.score(PROMPTS, ANSWERS)
    allowed = [(), tuple(patches[:1]), tuple(patches)]
    before = allowed[OPERATIONS[operation]]
    with lm.stacked(before):
        places = interrupted(None, lambda: operation(lm, patches))
    chance = random.Random(f"{kind} {operation.__name__}")
    for number in chance.sample(range(1, places), min(60, places - 1)):
        with lm.stacked(before):
            interrupted(number, lambda: operation(lm, patches))
            assert lm.patches in allowed if operation in (put_on, put_on_second, taken_off) else lm.patches == before
            wanted, rest, scores = states[lm.patches]
            assert torch.is_grad_enabled()
            assert same(bits(lm), wanted) and at_rest(lm) == rest, number
        assert lm.patches == () and same(bits(lm), states[()][0]) and at_rest(lm) == states[()][1]
    assert lm.score(PROMPTS, ANSWERS) == states[()][2] and scores


@swallowed
@pytest.mark.parametrize(
    "method",
    [
        ROME(layer=1, steps=2, covariance_tokens=200, context_groups=((1, 2),)),
        FT(layer=1, steps=2),
        GRACE(layer=1, steps=2),
        LoRA(layers=(1,), steps=2),
        KN(erase=True, steps=2, threshold=0.0, prompt_share=0.0),
    ],
    ids=lambda method: method.name,
)
def test_an_interrupted_edit_leaves_nothing_behind(method):
    lm = make_lm("gpt2")
    before, rest, wanted = bits(lm), at_rest(lm), method.edit(lm, FACTS[:1]).id
    places = interrupted(None, lambda: method.edit(lm, FACTS[:1]))
    for number in random.Random(method.name).sample(range(1, places), 25):
        interrupted(number, lambda: method.edit(lm, FACTS[:1]))
        assert torch.is_grad_enabled() and lm.patches == () and same(bits(lm), before) and at_rest(lm) == rest, number
    assert method.edit(lm, FACTS[:1]).id == wanted


def test_what_fails_half_way_leaves_nothing_behind(lm):
    """A sum that overflows behind one that does not; a memory whose second hook has no module."""
    half = LM((lm.model.half(), lm.tokenizer)) if lm.device.type != "cpu" else lm
    fine, base, rest = some_patch(half, layers=(0,)), bits(half), at_rest(half)
    name = half.parts.value[2]
    huge = Dense(torch.full(half.base_weight(name).shape, torch.finfo(half.dtype).max))
    many = Patch("rome", {}, fine.edits, {**fine.deltas, name: huge}, half.fingerprint)
    again = Patch("rome", {"again": 1}, fine.edits, {**fine.deltas, name: huge}, half.fingerprint)
    half.apply(many)
    one = bits(half)
    with pytest.raises(PatchError, match="overflows"):
        half.apply(again)
    assert half.patches == (many,) and same(bits(half), one)
    half.revert(many)
    hooks = Hooks({name: lambda *a: a[2], "nowhere": None})  # type: ignore[dict-item]
    with pytest.raises(AttributeError), half.temporary_memory("grace", hooks):
        pass
    assert same(bits(half), base) and at_rest(half) == rest
