"""The desk: answers in the order of the questions, each by its own stack; stops; who leaves."""

from __future__ import annotations

import asyncio
import threading

import pytest

from conftest import make_lm, some_patch
from reknow.errors import InputError
from reknow.serving.answers import Answer, Desk, Piece, _Ending
from reknow.serving.requests import CompletionRequest

PROMPTS = ["The mother tongue of Danielle Darrieux is", "The capital of Peru is"]


@pytest.fixture
def desk(lm):
    desk = Desk(lm)
    yield desk
    desk.close()


def asked(prompt=PROMPTS[0], **fields) -> Answer:
    return Answer(CompletionRequest.model_validate({"model": "m", "prompt": prompt, "max_tokens": 12} | fields))


async def written(desk: Desk, answer: Answer, *patches) -> list[Piece]:
    return [piece async for piece in desk.pieces(answer, patches)]


def joined(pieces: list[Piece], number: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.number == number)


def test_each_question_is_answered_by_its_own_stack(lm, desk):
    patches = [some_patch(lm, seed, size=30.0) for seed in (1, 2)]
    stacks = [(), (patches[0],), (patches[1],), tuple(patches)]
    wanted = []
    for stack in stacks:
        with lm.stacked(stack):
            wanted.append(lm.generate(PROMPTS[0], 12))
    assert len(set(wanted)) == 4

    async def all_at_once():
        return await asyncio.gather(*(written(desk, asked(), *stack) for stack in stacks * 3))

    assert [joined(pieces) for pieces in asyncio.run(all_at_once())] == wanted * 3


def test_several_prompts_and_what_is_counted(lm, desk):
    answer = asked(PROMPTS)
    pieces = asyncio.run(written(desk, answer))
    assert [joined(pieces, number) for number in (0, 1)] == lm.generate(PROMPTS, 12)
    assert answer.tokens == [12, 12] and answer.reasons == ["length", "length"]
    assert answer.prompt_tokens == sum(len(lm.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert len(pieces) > 10


def test_several_answers_to_each_question(lm, desk):
    answer = asked(PROMPTS, n=2, temperature=1.0, top_p=0.9, seed=3)
    pieces = asyncio.run(written(desk, answer))
    wanted = lm.generate([text for text in PROMPTS for _ in range(2)], 12, top_k=len(lm.tokenizer), top_p=0.9, seed=3)
    assert [joined(pieces, number) for number in range(4)] == wanted and wanted[0] != wanted[1]
    assert answer.prompt_tokens == sum(len(lm.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)


def test_an_answer_ends_before_a_stop(lm, desk):
    whole = lm.generate(PROMPTS[0], 12)
    stop = whole[5:8]
    answer = asked(stop=stop)
    assert joined(asyncio.run(written(desk, answer))) == whole[: whole.index(stop)]
    assert answer.reasons == ["stop"] and answer.tokens[0] <= 12


def test_a_stop_is_found_across_pieces_and_no_beginning_is_lost():
    ending = _Ending(("END", "ENOUGH"))
    told = [ending.take(piece) for piece in ("so E", "N", "I E", "NO", "U", "GH more")]
    assert told == [("so ", False), ("", False), ("ENI ", False), ("", False), ("", False), ("", True)]
    ending = _Ending(("END",))
    assert ending.take("the EN") == ("the ", False) and ending.rest == "EN"
    assert _Ending(()).take("END") == ("END", False)


def test_who_leaves_is_not_answered_to_the_end(lm, desk):
    begun, answer = threading.Event(), asked(max_tokens=60)

    async def leave():
        async for _ in desk.pieces(answer, ()):
            break

    asyncio.run(leave())
    desk.do(lambda _lm: begun.set()).result(60)
    assert begun.is_set() and answer.gone.is_set()
    assert joined(asyncio.run(written(desk, asked()))) == lm.generate(PROMPTS[0], 12)


def test_questions_of_one_stack_are_written_together_and_no_other_stack_s_wait_behind_them(lm, desk, monkeypatch):
    patch = some_patch(lm, size=30.0)
    with lm.patched(patch):
        edited = lm.generate(PROMPTS[1], 12)
    base = [lm.generate(prompt, 12) for prompt in PROMPTS]
    asked_together: list[int] = []
    generate = lm.generate
    monkeypatch.setattr(
        lm, "generate", lambda texts, *a, **o: asked_together.append(len(texts)) or generate(texts, *a, **o)
    )
    held, free = threading.Event(), threading.Event()
    desk.do(lambda _lm: held.set() or free.wait(60))
    held.wait(60)

    async def all_at_once():
        prompts = [(PROMPTS[0], ()), (PROMPTS[1], (patch,)), *[(PROMPTS[i % 2], ()) for i in range(20)]]
        tasks = [asyncio.ensure_future(written(desk, asked(prompt), *stack)) for prompt, stack in prompts]
        tasks.append(asyncio.ensure_future(written(desk, asked(temperature=2.0))))
        tasks.append(asyncio.ensure_future(written(desk, asked(max_tokens=3))))
        await asyncio.sleep(0)
        free.set()
        return await asyncio.gather(*tasks)

    found = [joined(pieces) for pieces in asyncio.run(all_at_once())]
    assert found[:2] == [base[0], edited] and found[2:22] == base * 10
    assert asked_together == [16, 1, 5, 1, 1], "the oldest first, sixteen at most"


def test_one_that_leaves_or_is_wrong_takes_nobody_with_it(lm, desk):
    held, free = threading.Event(), threading.Event()
    desk.do(lambda _lm: held.set() or free.wait(60))
    held.wait(60)
    gone = asked()

    async def all_at_once():
        tasks = [asyncio.ensure_future(written(desk, one)) for one in (asked(), asked("a " * 5000), gone, asked())]
        await asyncio.sleep(0)
        gone.gone.set()
        free.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, wrong, left, last = asyncio.run(all_at_once())
    assert joined(first) == joined(last) == lm.generate(PROMPTS[0], 12)
    assert isinstance(wrong, InputError) and left == []


def test_what_is_wrong_is_said_before_the_first_piece(desk):
    with pytest.raises(InputError, match="tokens"):
        asyncio.run(written(desk, asked("a " * 5000)))


def test_a_question_that_breaks_down_leaves_the_next_one_whole(lm, desk):
    other = make_lm("gpt2", n_embd=16, n_head=2)
    with pytest.raises(Exception, match="expected"):
        asyncio.run(written(desk, asked(), some_patch(other)))
    assert joined(asyncio.run(written(desk, asked()))) == lm.generate(PROMPTS[0], 12)
