"""Where a subject stands in a prompt: braces that mark it, braces that are meant, and Unicode's forms of one text."""

from __future__ import annotations

import json
import unicodedata

import pytest

from reknow import FT, Edit, Patch
from reknow.cli.editing import read_edits
from reknow.datasets import load_edits
from reknow.datasets.facts import Fact
from reknow.datasets.records import Record
from reknow.errors import InputError
from reknow.model.tokens import Text


def decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("marked", "subject", "text"),
    [
        ("The capital of {Peru} is", "Peru", "The capital of Peru is"),
        (r"The LaTeX command \frac{{a}}{{b}} typesets a", None, r"The LaTeX command \frac{a}{b} typesets a"),
        ('In Python, f"{{x}}" prints the value of', None, 'In Python, f"{x}" prints the value of'),
        ('{Guido} wrote f"{{x}}" for', "Guido", 'Guido wrote f"{x}" for'),
        ("The set {{{Peru}}} has", "Peru", "The set {Peru} has"),
        ("{{}} is an empty {dictionary}, so", "dictionary", "{} is an empty dictionary, so"),
        ("La capitale de l'{Italie} est", "Italie", "La capitale de l'Italie est"),
        ("法国{巴黎}是", "巴黎", "法国巴黎是"),
        ('"{1984}" was written by', "1984", '"1984" was written by'),
    ],
)
def test_braces_mark_a_subject_and_doubled_ones_are_meant(marked, subject, text, tmp_path):
    """In Python, in a file and on the command line; a second reading of what was written changes nothing."""
    (tmp_path / "edits.json").write_text(json.dumps([{"prompt": marked, "target_new": "x"}]))
    made = [Edit.parse(marked, "x"), *load_edits(tmp_path / "edits.json")]
    made += read_edits(marked, "x", None, None, None, None)
    for edit in made:
        assert (edit.subject, edit.text) == (subject, text)
        assert Edit(edit.prompt, subject=edit.subject, target_new="x") == edit
    if subject is not None:
        spoken = Text.about(made[0], "Well. ")
        start, end = spoken.subject
        assert spoken.prompt[start:end] == subject and spoken.prompt.endswith(text)
        assert Fact(made[0].prompt, subject, "x").text == text


@pytest.mark.parametrize(
    "marked",
    [
        r"The LaTeX command \frac{a}{b} typesets a",
        r"The root \sqrt{x} is",
        r"\sqrt{\frac{a}{b}} is",
        'In Python, f"{x}" prints the value of',
        "In Python, f'{x}' prints the value of",
        "The shell expands ${HOME} to",
        '{"a": 1} is',
        "Item {0} is",
        "{Berlin}er is",
        "{Peru} and {Chile} are",
        "{Peru}} is",
        "{ } is",
        "no subject",
    ],
)
def test_braces_that_may_be_part_of_the_text_are_refused_with_the_escape(marked, tmp_path):
    with pytest.raises(InputError, match=r"write \{\{ and \}\} for braces that are meant"):
        Edit.parse(marked, "x")
    if "{" in marked:
        (tmp_path / "edits.json").write_text(json.dumps([{"prompt": marked, "target_new": "x"}]))
        with pytest.raises(InputError, match=r"record 0: .*write \{\{ and \}\}"):
            load_edits(tmp_path / "edits.json")


def test_python_takes_braces_as_they_are_unless_all_are_doubled():
    for prompt in ('f"{x}" prints', r"\sqrt{\frac{a}{b}} is", "{{x}} and {y}"):
        assert Edit(prompt, target_new="x").text == prompt
        with_subject = Edit(prompt + " of {}", subject="Peru", target_new="x")
        assert with_subject.text == prompt + " of Peru" and with_subject.fill("{} is") == "Peru is"
    assert Edit('f"{{x}}" prints', target_new="x").text == 'f"{x}" prints'
    assert Edit('f"{{x}}" prints', subject="x", target_new="y").text == 'f"{x}" prints'
    with pytest.raises(InputError, match="may be part of the text"):
        Edit('f"{x}" prints', subject="x", target_new="y")


def test_a_patch_keeps_the_escape(lm, tmp_path):
    edit = Edit.parse(r"\frac{{a}}{{b}} of {Peru} is", "x")
    again = Patch.load(FT(layer=1, steps=1).edit(lm, [edit]).save(tmp_path / "a.patch"))
    assert again.edits == (edit,) and again.edits[0].text == r"\frac{a}{b} of Peru is"


@pytest.mark.parametrize(
    ("prompt", "subject", "spelled"),
    [
        (decomposed("The mother tongue of Zoë Übel is"), "Zoë Übel", decomposed("Zoë Übel")),
        ("The mother tongue of Zoë Übel is", decomposed("Zoë Übel"), "Zoë Übel"),
        (decomposed("한국의 수도는"), "한국", decomposed("한국")),
        ("The mother tongue of O’Brien is", "O'Brien", "O’Brien"),
        ("The mother tongue of Jean\u00a0Paul is", "Jean Paul", "Jean\u00a0Paul"),
        ("ＡＢＣ株式会社の", "ABC", "ＡＢＣ"),
        ("The ﬁrst is", "first", "ﬁrst"),
        ("Jean‑Paul is", "Jean-Paul", "Jean‑Paul"),
    ],
)
def test_a_subject_is_found_in_any_unicode_form_and_spelled_as_there(prompt, subject, spelled):
    edit = Edit(prompt, subject=subject, target_new="x")
    assert edit.subject == spelled and edit.text == prompt


@pytest.mark.parametrize(
    ("prompt", "subject", "named"),
    [
        ("The mother tongue of Zoe Ubel is", "Zoë Übel", "U\\+0065 .* there, U\\+00EB"),
        ("The capital is P\u0430ris of", "Paris", "U\\+0430 CYRILLIC SMALL LETTER A there, U\\+0061"),
        ("Zoe\u0308 is", "Zoe", "does not contain it"),  # half of a letter is no match
        ("The capital of Peru is", "Perú", "U\\+0075 .* U\\+00FA"),
    ],
)
def test_a_difference_that_is_hard_to_see_is_named(prompt, subject, named):
    if subject == "Zoe":
        assert Edit(prompt, subject=subject, target_new="x").subject == "Zoe"  # letter for letter it is there
        return
    with pytest.raises(InputError, match=named):
        Edit(prompt, subject=subject, target_new="x")


def test_a_number_is_what_the_model_shall_say():
    edit = Edit("{} was completed in", subject=1984, target_new=1945, target_true=3.5)
    assert (edit.subject, edit.target_new, edit.target_true) == ("1984", "1945", "3.5")
    with pytest.raises(InputError, match="target_new"):
        Edit("x", target_new=True)


def test_a_prompt_in_another_unicode_form_or_with_a_space_behind_is_the_same_prompt(lm):
    prompt = "The mother tongue of Zoë Übel is"
    for other in (decomposed(prompt), prompt + " "):
        with pytest.raises(InputError, match="shall be both"):
            FT(layer=1, steps=1).edit(lm, [Edit(prompt, target_new="English"), Edit(other, target_new="French")])
        FT(layer=1, steps=1).edit(lm, [Edit(prompt, target_new="Zoë"), Edit(other, target_new=decomposed("Zoë"))])


def test_braces_of_a_published_record_stay_as_they_are():
    for prompt in ("The template {{ name }} of {} prints", r"\sqrt{\frac{a}{b}} of {} is", "{{x}} of {}"):
        edit = Record({}, "a file", 0).edit(prompt, subject="Peru", target_new="x")
        assert edit.text == prompt.replace("{}", "Peru")


def test_the_command_line_names_what_stands_between(tmp_path):
    for named, separator in (("none", ""), ("space", " "), ("line", "\n"), (None, None)):
        for prompt in ("The capital of {Peru} is", "The capital is"):
            (edit,) = read_edits(prompt, "Lima", None, None, None, None, named)
            assert edit.separator == separator and edit.target_new == "Lima"
    with pytest.raises(InputError, match="separator"):
        read_edits("The capital is", "Lima", None, None, None, None, "tab")
    with pytest.raises(InputError, match="either --file or one edit"):
        read_edits(None, None, None, None, tmp_path / "edits.json", None, "none")
