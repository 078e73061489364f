"""A trace in words: tokens in their words, the sentence of the whole, the sentence of a cell."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from reknow.errors import InputError
from reknow.report.trace_words import cell_sentence, label_tokens, name_place, percent, sentence_of, subject_text
from reknow.texts.writing import word_spans
from reknow.tracing.causal import Trace

LAYERS = 6
TOKENS = ("The", " mother", " of", " Dar", "ri", "eux", " is")


def a_trace(
    cells: Mapping[tuple[str, int, int], float] | None = None,
    *,
    prompt: str = "The mother of Darrieux is",
    tokens: tuple[str, ...] = TOKENS,
    subject: tuple[int, int] = (3, 6),
    answer: str = " French",
    clean: float = 0.9,
    corrupted: float = 0.1,
    kinds: tuple[str, ...] = ("hidden", "mlp", "attention"),
    window: int = 2,
    rest: float | None = None,
) -> Trace:
    """A trace in which nothing is restored (or `rest`) but in these cells: (kind, token, layer) → probability."""
    empty = corrupted if rest is None else rest
    tables = {kind: torch.full((len(tokens), LAYERS), empty) for kind in kinds}
    for (kind, token, layer), value in (cells or {}).items():
        tables[kind][token, layer] = value
    return Trace(prompt, tokens, subject, answer, clean, corrupted, tables, window)  # type: ignore[arg-type]


def labels(prompt: str, *tokens: str, subject: tuple[int, int] = (0, 1)) -> list[tuple[str, str, str]]:
    return [label[:3] for label in label_tokens(a_trace(prompt=prompt, tokens=tokens, subject=subject))]


# --- tokens -----------------------------------------------------------------------------------------------


def test_a_token_is_shown_in_its_word():
    found = label_tokens(a_trace())
    assert [label.text for label in found] == ["The", "mother", "of", "Darrieux", "Darrieux", "Darrieux", "is"]
    assert [label[:3] for label in found[3:6]] == [("", "Dar", "rieux"), ("Dar", "ri", "eux"), ("Darri", "eux", "")]
    assert [label.in_subject for label in found] == [False] * 3 + [True] * 3 + [False]


def test_tokens_without_the_spaces_before_them_are_found_in_their_words_too():
    """As tokenizers that join by ▁ give them, one by one."""
    found = labels("Beats Music is Beats", "<s>", "Be", "ats", "Music", "is", "Be", "ats", subject=(1, 4))
    assert found[:4] == [("", "<s>", ""), ("", "Be", "ats"), ("Be", "ats", ""), ("", "Music", "")]
    assert found[5:] == [("", "Be", "ats"), ("Be", "ats", "")]


def test_signs_stand_by_themselves_and_names_keep_theirs():
    found = labels("O'Brien (Paris), 1,889", "O", "'", "Brien", " (", "Paris", "),", " 1", ",", "889")
    assert found == [
        ("", "O", "'Brien"), ("O", "'", "Brien"), ("O'", "Brien", ""), ("", "(", ""), ("", "Paris", ""),
        ("", "),", ""), ("", "1", ",889"), ("1", ",", "889"), ("1,", "889", ""),
    ]  # fmt: skip


def test_a_script_without_spaces_has_its_characters_as_words():
    assert labels("法国的首都", "法国", "的", "首都") == [("", "法国", ""), ("", "的", ""), ("", "首都", "")]
    assert labels("เมืองหลวง", "เมือง", "หลวง") == [("", "เมือง", ""), ("", "หลวง", "")]


def test_characters_of_several_tokens_are_shown_for_each():
    found = labels("法国的é", "法", "\ufffd", "\ufffd", "的", "\ufffd", "\ufffd", subject=(0, 3))
    assert found == [("", "法", ""), ("", "国", " 1/2"), ("", "国", " 2/2"), ("", "的", ""), ("", "é", " 1/2"),
                     ("", "é", " 2/2")]  # fmt: skip
    trace = a_trace(prompt="法国的", tokens=("法", "\ufffd", "\ufffd", "的"), subject=(0, 3))
    assert subject_text(trace) == "法国"
    assert name_place(trace, 2) == "the subject's last token, “国”"


def test_what_cannot_be_seen_is_written_out():
    assert labels("A\n\tB\u200b", "A", "\n", "\t", "B", "\u200b") == [
        ("", "A", ""), ("", "\\n", ""), ("", "\\t", ""), ("", "B", ""), ("", "\\u200b", ""),
    ]  # fmt: skip
    assert labels("A  B", "A", " ", " B") == [("", "A", ""), ("", "␣", ""), ("", "B", "")]


def test_special_tokens_and_those_of_another_spelling_stay_as_they_are():
    found = labels("The END", "<|begin|>", "the", " end", "</s>", subject=(1, 2))
    assert found == [("", "<|begin|>", ""), ("", "the", ""), ("", "end", ""), ("", "</s>", "")]
    assert subject_text(a_trace(prompt="PERU is", tokens=("<s>", "pe", "ru", "is"), subject=(1, 3))) == "peru"


def test_a_word_that_is_too_long_for_a_label_is_left_out_around_the_token():
    word = "Donau" + "dampf" * 6
    found = labels(word, "Donau", *["dampf"] * 6)
    assert found[:2] == [("", "Donau", "…"), ("…", "dampf", "…")] and found[-1] == ("…", "dampf", "")


def test_a_token_that_is_not_there_does_not_skip_others():
    found = labels("Be ats the Be", "<s>", "x", "Be", "ats", "the", "Be", subject=(2, 4))
    assert [label[1] for label in found] == ["<s>", "x", "Be", "ats", "the", "Be"]


def test_words_are_where_they_stand():
    text = "AT&T’s 3.5 法国!"
    assert [text[slice(*span)] for span in word_spans(text)] == ["AT&T", "s", "3.5", "法", "国"]


@pytest.mark.parametrize(
    ("token", "said", "bare"),
    [
        (0, "a token before the subject, “The”", "a token before the subject, “The”"),
        (3, "the subject's first token, “Dar”", "the subject's first token"),
        (4, "a token of the subject, “ri”", "a token of the subject, “ri”"),
        (5, "the subject's last token, “eux”", "the subject's last token"),
        (6, "the prompt's last token, “is”", "the prompt's last token"),
    ],
)
def test_a_token_has_a_place(token, said, bare):
    assert name_place(a_trace(), token) == said
    assert name_place(a_trace(), token, quoted=False) == bare


def test_places_of_a_short_subject_and_of_one_that_ends_the_prompt():
    one = a_trace(prompt="In Peru now is", tokens=("In", " Peru", " now", " is"), subject=(1, 2))
    assert name_place(one, 1) == "the subject's only token, “Peru”"
    assert name_place(one, 2) == "a token behind the subject, “now”"
    last = a_trace(prompt="The capital of Peru", tokens=("The", " capital", " of", " Per", "u"), subject=(3, 5))
    assert name_place(last, 4) == "the subject's last token and the prompt's, “u”"


# --- the whole --------------------------------------------------------------------------------------------


def test_the_sentence_says_where_the_hidden_state_and_which_layers_bring_the_answer_back():
    early = {("hidden", 5, layer): 0.6 for layer in (0, 1, 2)}
    late = {("hidden", 6, layer): 0.8 for layer in (3, 4, 5)}
    trace = a_trace({**early, **late, ("mlp", 5, 2): 0.42, ("attention", 6, 4): 0.3})
    assert sentence_of(trace) == (
        "With “Darrieux” corrupted, “French” falls from 90.0 % to 10.0 %; restoring the hidden state brings most of "
        "that back at the subject's last token, “eux”, in layers 0–2, and at the prompt's last token, “is”, from "
        "layer 3 on; of MLPs and attention, the MLPs of layers 1–2 at the subject's last token bring back most, 40 %."
    )


def test_the_sentence_says_where_only_the_last_token_does():
    cells = {("hidden", 6, layer): 0.9 for layer in range(LAYERS)}
    cells |= {("hidden", 5, 1): 0.4, ("attention", 6, 0): 0.95}
    assert sentence_of(a_trace(cells, window=1)) == (
        "With “Darrieux” corrupted, “French” falls from 90.0 % to 10.0 %; restoring the hidden state brings most of "
        "that back only at the prompt's last token, “is”, in every layer; of MLPs and attention, attention in layer "
        "0 at the prompt's last token brings back all."
    )


def test_half_of_the_loss_is_most_of_it_and_less_is_not():
    half = {("hidden", 5, 0): 0.5, ("hidden", 5, 2): 0.5, ("hidden", 5, 3): 0.5, ("hidden", 5, 5): 0.5}
    trace = a_trace(half, clean=1.0, corrupted=0.0)
    assert "at the subject's last token, “eux”, in layers 0, 2–3 and 5; " in sentence_of(trace)
    trace = a_trace(dict.fromkeys(half, 0.49), clean=1.0, corrupted=0.0)
    assert (
        "no hidden state brings most of that back, at best 49 % in layer 0 at the subject's last token, “eux”; "
        "MLPs and attention by themselves bring back less than 10 %." in sentence_of(trace)
    )


def test_a_subject_that_ends_the_prompt_is_named_once():
    trace = a_trace(
        {("hidden", 2, layer): 0.9 for layer in range(LAYERS)},
        prompt="capital of Peru",
        tokens=("capital", " of", " Peru"),
        subject=(2, 3),
        kinds=("hidden",),
    )
    assert sentence_of(trace).endswith(
        "most of that back only at the subject's only token and the prompt's, “Peru”, in every layer."
    )


def test_what_was_not_traced_is_not_spoken_of():
    cells = {(kind, 5, layer): value for kind, value in (("hidden", 0.2), ("mlp", 0.7)) for layer in range(LAYERS)}
    trace = a_trace(cells, rest=math.nan, kinds=("hidden", "mlp", "attention"))
    assert sentence_of(trace).endswith(
        "no hidden state brings most of that back, at best 12 % in layer 0 at the subject's last token, “eux”; "
        "of MLPs, the MLP of layer 0 at the subject's last token brings back most, 75 %."
    )
    assert sentence_of(a_trace({}, rest=math.nan)) == (
        "With “Darrieux” corrupted, “French” falls from 90.0 % to 10.0 %."
    )


LITTLE = (
    "The subject hardly matters here: “French” has {}, and still {} with “Darrieux” corrupted, so there is little"
)
NOTHING = (
    "The answer does not hang on the subject here: “French” has {}, and {} with “Darrieux” corrupted, so "
    "there is nothing"
)


@pytest.mark.parametrize(
    ("clean", "corrupted", "said"),
    [
        (0.5, 0.451, LITTLE.format("50.0 %", "45.1 %")),
        (0.5, 0.5, LITTLE.format("50.0 %", "50.0 %")),
        (0.2, 0.3, NOTHING.format("20.0 %", "30.0 %")),
        (0.0, 0.0, LITTLE.format("0.0 %", "0.0 %")),
    ],
)
def test_a_subject_that_does_not_matter_is_said_to_do_so(clean, corrupted, said):
    assert sentence_of(a_trace({("hidden", 5, 0): 0.9}, clean=clean, corrupted=corrupted)) == f"{said} to bring back."


def test_probabilities_as_people_read_them():
    assert [percent(p) for p in (1.0, 0.9995, 0.0783, 0.001, 0.0004, 0.0)] == [
        "100.0 %", "100.0 %", "7.8 %", "0.1 %", "< 0.1 %", "0.0 %",
    ]  # fmt: skip


# --- one cell ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "token", "layer", "value", "said"),
    [
        ("hidden", 5, 3, 0.5, "the hidden state of layer 3 restored at the subject's last token, “eux” 50.0 %: 50 %"),
        ("mlp", 6, 0, 0.9, "the MLP of layer 0 restored at the prompt's last token, “is” 90.0 %: all"),
        ("mlp", 6, 3, 0.26, "the MLPs of layers 2–3 restored at the prompt's last token, “is” 26.0 %: 20 %"),
        ("attention", 0, 5, 0.05,
         "attention in layers 4–5 restored at a token before the subject, “The” 5.0 %: nothing"),
        ("mlp_severed", 3, 1, 0.18,
         "the hidden state of layer 1, that token's MLPs left corrupted, restored at the subject's first token, "
         "“Dar” 18.0 %: 10 %"),
    ],
)  # fmt: skip
def test_a_cell_says_what_was_restored_and_what_came_back(kind, token, layer, value, said):
    trace = a_trace({(kind, token, layer): value}, kinds=("hidden", "mlp", "attention", "mlp_severed"))
    said = "With " + said.replace("” ", "”, “French” has ", 1)
    assert cell_sentence(trace, kind, token, layer) == (
        f"{said} of what corrupting the subject takes away, from 90.0 % to 10.0 %, is back."
    )


def test_a_cell_of_a_subject_that_does_not_matter_and_one_that_was_not_traced():
    trace = a_trace({("hidden", 5, 3): 0.25, ("mlp", 5, 3): math.nan}, clean=0.2, corrupted=0.3)
    assert cell_sentence(trace, "hidden", 5, 3) == (
        "With the hidden state of layer 3 restored at the subject's last token, “eux”, “French” has 25.0 %; it has "
        "20.0 % as it is, and 30.0 % with the subject corrupted."
    )
    assert cell_sentence(trace, "mlp", 5, 3) == (
        "The MLPs of layers 2–3 at the subject's last token, “eux”: this was not traced."
    )


@pytest.mark.parametrize("cell", [("mlp_severed", 0, 0), ("x", 0, 0), ("mlp", 7, 0), ("mlp", -1, 0), ("mlp", 0, 6)])
def test_a_cell_that_is_not_there_is_refused(cell):
    with pytest.raises(InputError, match=r"expected a cell of hidden, mlp, attention with 7 tokens.*; got"):
        cell_sentence(a_trace(), *cell)
