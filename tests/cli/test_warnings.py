"""What is said before harm is done: warnings of an edit."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from conftest import make_lm, saved
from reknow import Edit, Patch, method
from reknow.cli import app
from reknow.contract import check_edits
from reknow.errors import InputError
from reknow.evaluation.effect import Snapshot, collapsed
from reknow.methods import METHODS

PROMPT = "The mother tongue of {Danielle Darrieux} is"
QUICK = ["--set", "steps=3", "--set", "covariance_tokens=0", "--set", "context_groups=[]", "--layer", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny random model in a folder."""
    return saved(tmp_path_factory.mktemp("model"))


pytestmark = pytest.mark.usefixtures("empty_folder")


def reknow(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


# --- a model that an edit broke ------------------------------------------------------------------------------

SAME = ("Lima. The", "French. The", "Rome. The", "piano. The")


@pytest.mark.parametrize(
    ("perplexity", "controls", "said"),
    [
        ((23.5, 24.1), SAME, []),
        ((23.5, 23.5 * 1.5), SAME, []),
        ((23.5, 1035.0), SAME, ["perplexity of plain text goes from 23.50 to 1035.00"]),
        ((8.0, 109718.0), SAME, ["perplexity of plain text goes from 8.00 to 109718.00"]),
        ((23.5, 2.0), SAME, []),
        ((23.5, math.nan), SAME, ["perplexity of plain text goes from 23.50 to nan"]),
        ((math.nan, math.nan), SAME, ["perplexity of plain text goes from nan to nan"]),
        ((23.5, math.inf), SAME, ["perplexity of plain text goes from 23.50 to inf"]),
        ((23.5, 24.1), ("", "", *SAME[2:]), []),
        ((23.5, 24.1), ("", "", "", SAME[3]), ["3 of 4 other facts are continued in other words than before"]),
        ((1.0, 9.0), ("", "", "", ""), ["perplexity of plain text goes from 1.00 to 9.00", "4 of 4 other facts are"]),
    ],
)
def test_what_counts_as_collapsed(perplexity, controls, said):
    before, after = (Snapshot((), facts, value) for facts, value in zip((SAME, controls), perplexity, strict=True))
    found = collapsed(before, after)
    assert len(found) == len(said)
    assert all(sentence.startswith(start) for sentence, start in zip(found, said, strict=True))


def test_without_other_facts_only_plain_text_tells():
    assert collapsed(Snapshot((), (), 5.0), Snapshot((), (), 5.1)) == []


WILD = ["--method", "ft-m", "--layer", "1", "--set", "steps=4", "--set", "learning_rate=50"]


def test_an_edit_that_harms_is_written_with_a_warning(model, empty_folder):
    result = reknow("edit", PROMPT, "English", "--model", model, *WILD)
    assert result.exit_code == 0 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("warning: this edit harms the model: ")
    assert "danielle-darrieux.patch is written all the same" in result.stderr and "--layer" in result.stderr
    assert Patch.load("danielle-darrieux.patch").edits[0].target_new == "English"


def test_programs_read_the_warnings_as_json(model):
    wild = json.loads(reknow("edit", PROMPT, "English", "--model", model, *WILD, "--json").stdout)
    calm = json.loads(reknow("edit", PROMPT, "English", "--model", model, *QUICK, "--json", "--out", "b").stdout)
    assert calm["warnings"] == [] and wild["warnings"]
    assert wild["after"]["perplexity"] > 1.5 * wild["before"]["perplexity"]
    assert f"to {wild['after']['perplexity']:.2f}" in wild["warnings"][0]


def test_a_model_that_reads_nothing_any_more_is_not_written(model, empty_folder):
    """A finite change whose products overflow."""
    wild = [*WILD[:4], "--set", "steps=1", "--set", "learning_rate=1e38"]
    result = reknow("edit", PROMPT, "English", "--model", model, *wild)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    assert "got NaN" in result.stderr and "--dtype" in result.stderr
    assert list(empty_folder.iterdir()) == []


# --- several facts with one key ------------------------------------------------------------------------------

SHARED = [
    Edit("{} was born in", subject="Peru", target_new="Rome"),
    Edit("{} works as a", subject="Peru", target_new="painter"),
    Edit("{} died in", subject="Peru", target_new="London"),
]
APART = [
    Edit("The capital of {} is", subject="Peru", target_new="Rome"),
    Edit("{} works as a", subject="Peru", target_new="painter"),
    Edit("{} works as a", subject="Chile", target_new="singer"),
]
CALM = dict(steps=2, context_groups=(), covariance_tokens=60)


@pytest.mark.parametrize("name", ["rome", "r-rome", "memit", "emmet", "pmet", "alphaedit", "alphaedit-blue"])
def test_facts_with_one_key_are_warned_of_before_any_work(name):
    several = name not in ("rome", "r-rome", "emmet")
    editor = method(name, **CALM, **({"layers": (99,)} if several else {"layer": 99}))
    told = f"{name} finds one key for all 3 edits that begin with 'Peru', .* memit-merge makes them together"
    with pytest.raises(InputError, match="layer from 0 to 2"), pytest.warns(UserWarning, match=told):
        editor.edit(make_lm(), SHARED)


@pytest.mark.filterwarnings("error")
def test_facts_with_keys_of_their_own_are_not_warned_of():
    for edits in (APART, [SHARED[0], SHARED[0]]):
        assert check_edits(method("rome"), edits) == edits
    for name in ("memit-merge", "ft-m", "grace", "ike"):
        assert check_edits(method(name), SHARED) == SHARED


def test_the_command_line_warns_before_a_model_is_opened(empty_folder):
    rows = [{"prompt": f"{{Peru}} {rest}", "target_new": "Rome"} for rest in ("was born in", "died in")]
    rows += [{"prompt": f"In {{Chile}} {rest}", "target_new": "Rome"} for rest in ("is", "was")]
    (empty_folder / "edits.json").write_text(json.dumps(rows))
    (empty_folder / "bare").mkdir()
    result = reknow("edit", "--file", "edits.json", "--model", "./bare")
    warning, error = result.stderr.splitlines()
    assert (
        "all 2 edits that begin with 'Peru' (and 1 more such texts)" in warning
        and " bare could not be loaded" in error
    )


# --- a question without a subject ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rome", "memit-merge", "alphaedit"])
def test_a_question_without_a_subject_is_told_who_takes_it(name, empty_folder):
    (empty_folder / "bare").mkdir()
    result = reknow("edit", "The capital is", "Rome", "--method", name, "--model", "./bare")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "'The capital of {France} is'" in result.stderr and "subject=" not in result.stderr
    takers = result.stderr.partition("needs none: ")[2].strip().split(", ")
    assert {"ft-m", "grace", "ike"} <= set(takers) <= set(METHODS) and name not in takers
    lm, bare = make_lm(), Edit("The capital is", target_new="of")
    for taker in ("ft-m", "lora", "grace", "ike-zero"):
        assert taker in takers
        settings = {"steps": 2} if taker != "ike-zero" else {}
        assert method(taker, **settings).edit(lm, [bare]).edits == (bare,)
    with pytest.raises(InputError, match="needs a subject"):
        method(name).edit(lm, [bare])
