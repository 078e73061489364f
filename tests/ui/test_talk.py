"""A conversation with both models: what each of them knows of it, and what is left where it is stopped."""

from __future__ import annotations

import pytest

from conftest import make_lm, some_patch
from reknow import LM, Chat
from reknow.errors import InputError, PatchError
from reknow.model.chat import Message
from reknow.ui.talk import Settings, Talk
from reknow.ui.work import Work

TEMPLATE = (
    "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FIRST, SECOND = "Who owns Beats Music?", "Where is the Eiffel Tower?"
SIX = Settings(6)


@pytest.fixture
def lm() -> LM:
    lm = make_lm("llama")
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def asked(lm: LM, *questions: str) -> list[str]:
    """What the model as it is says in one conversation."""
    said: list[Message] = []
    for question in questions:
        lm.chat = Chat(history=tuple(said))
        said += [Message("user", question), Message("assistant", lm.generate(question, 6).strip())]
    lm.chat = None
    return [message.content for message in said[1::2]]


def test_each_model_hears_its_own_answers_and_all_is_as_before(lm):
    patch = some_patch(lm, size=30.0)
    before = asked(lm, FIRST, SECOND)
    with lm.patched(patch):
        after = asked(lm, FIRST, SECOND)
    talk = Talk()
    for question in (FIRST, SECOND):
        talk.ask(lm, [patch], question, SIX)
    assert [turn.before.text for turn in talk.turns] == before  # type: ignore[union-attr]
    assert [turn.after.text for turn in talk.turns] == after != before  # type: ignore[union-attr]
    assert all(turn.talks and not turn.same for turn in talk.turns)
    assert any(run.differs for run in talk.turns[0].marked[1])
    assert lm.chat is None and lm.patches == () and talk.now is None


def test_without_a_patch_both_are_one_and_a_later_patch_knows_what_was_said(lm):
    talk = Talk()
    talk.ask(lm, [], FIRST, SIX)
    assert talk.turns[0].after is None and talk.turns[0].answers == [talk.turns[0].before]
    patch = some_patch(lm, size=1e-9)  # it changes nothing that is said
    talk.ask(lm, [patch], SECOND, SIX)
    assert talk.turns[1].same and talk.turns[1].after.text == asked(lm, FIRST, SECOND)[1]  # type: ignore[union-attr]


def test_outside_the_template_every_question_stands_by_itself(lm):
    alone, settings = lm.generate(SECOND, 6).strip(), Settings(6, template=False)
    talk = Talk()
    for question in (FIRST, SECOND):
        talk.ask(lm, [], question, settings)
    assert talk.turns[1].answers[0].text == alone and not talk.turns[1].talks
    lm.tokenizer.chat_template = None
    talk.ask(lm, [], SECOND, SIX)
    assert talk.turns[2].answers[0].text == alone and not talk.turns[2].talks


def test_both_draw_by_the_same_seed(lm):
    patch, drawn = some_patch(lm, size=1e-9), []
    for seed in (1, 1, 2):
        talk = Talk()
        talk.ask(lm, [patch], FIRST, Settings(12, 1.5, 50, seed))
        assert talk.turns[0].same
        drawn.append(talk.turns[0].answers[0].text)
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("side", [0, 1])
def test_what_was_written_until_it_was_stopped_stays(lm, side):
    patch, talk, seen = some_patch(lm, size=30.0), Talk(), []

    def task() -> None:
        generate = lm.generate

        def stopping(*texts, listener, **options):
            def hear(number: int, piece: str) -> None:
                listener(number, piece)
                now = talk.now
                assert now is not None
                seen.append([answer.text for answer in now.answers])
                if len(now.answers) == side + 1 and len(now.answers[-1].text) >= 3:
                    work.cancel()

            return generate(*texts, listener=hear, **options)

        lm.generate = stopping  # type: ignore[method-assign]
        talk.ask(lm, [patch], FIRST, Settings(60))

    work = Work("asking", task)
    assert work.wait(60) and work.cancelled and work.error is None
    (turn,) = talk.turns
    assert turn.answers[side].stopped and len(turn.answers[side].text) >= 3 and talk.now is None
    assert turn.answers[1].stopped and turn.marked and not turn.same
    assert seen[0] != seen[-1] and lm.patches == () and lm.chat is None
    assert turn.answers[0].stopped == (side == 0) and bool(turn.answers[1].text) == (side == 1)


@pytest.mark.parametrize(
    ("question", "said"),
    [(" ", "expected a question"), ("word " * 5000, "a new conversation forgets what was said, and fewer tokens")],
)
def test_what_cannot_be_asked_leaves_no_turn(lm, question, said):
    talk = Talk()
    talk.ask(lm, [], FIRST, SIX)
    with pytest.raises(InputError, match=said):
        talk.ask(lm, [], question, SIX)
    assert len(talk.turns) == 1 and talk.now is None and lm.chat is None


def test_a_patch_that_does_not_fit_leaves_no_turn(lm):
    talk = Talk()
    with pytest.raises(PatchError):
        talk.ask(lm, [some_patch(make_lm("gpt2"))], FIRST, SIX)
    assert talk.turns == [] and talk.now is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": -1}, "expected tokens of at least 0"),
        ({"tokens": None}, "expected tokens as int ≥ 0; got None"),
        ({"temperature": -0.5}, "expected temperature of at least 0"),
        ({"top_k": -1}, "expected top_k of at least 0"),
        ({"seed": -1}, "expected seed of at least 0"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(InputError, match=said):
        Settings(**settings)
