"""What settings may be: bounds on the fields of every method and group of options, in Python and as typed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from typer.testing import CliRunner

from reknow import METHODS, method
from reknow.checks.bounds import Name, Number, Part, Rate, Share, check_settings, convert, describe_type, field_types
from reknow.checks.reading import read_value
from reknow.cli import app
from reknow.cli.settings import build_method
from reknow.errors import InputError
from reknow.evaluation.plan import Plan
from reknow.instructions.search import Search
from reknow.learning.training import Training
from reknow.studies.instructedit.editors import Budget
from reknow.tracing.causal import Tracing


@dataclass(frozen=True)
class Example:
    steps: Number = 1
    rate: Rate | None = None
    share: Share = 0.5
    part: Part = 1.0
    groups: tuple[tuple[Number, Number], ...] = ()
    kind: Literal["a", "b"] = "a"
    file: Name | None = None
    layer: int | tuple[int, ...] | None = None
    quiet: bool = False
    link: str = " "

    def __post_init__(self):
        check_settings(self)


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [
        ("steps", np.int64(5), 5),
        ("rate", 3, 3.0),
        ("rate", np.float32(2), 2.0),
        ("rate", None, None),
        ("groups", [[1, 2], (3, 4)], ((1, 2), (3, 4))),
        ("file", Path("a/b"), "a/b"),
        ("layer", [1, 2], (1, 2)),
        ("layer", np.arange(2)[1], 1),
        ("link", "", ""),
    ],
)
def test_values_are_held_in_the_type_of_their_field(name, value, held):
    found = getattr(Example(**{name: value}), name)
    assert found == held and type(found) is type(held)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("steps", 0, "expected steps of at least 1; got 0"),
        ("steps", 10**22, "expected steps of at most 1,000,000,000; got 10000000000000000000000"),
        ("steps", "3", "expected steps as int ≥ 1; got '3'"),
        ("steps", 2.0, "expected steps as int ≥ 1; got 2.0"),
        ("steps", True, "expected steps as int ≥ 1; got True"),
        ("steps", None, "expected steps as int ≥ 1; got None"),
        ("rate", 0, "expected rate above 0; got 0"),
        ("rate", -1e-9, "expected rate above 0; got -1e-09"),
        ("rate", math.nan, "expected rate as float > 0 or none; got nan"),
        ("rate", math.inf, "expected rate as float > 0 or none; got inf"),
        ("share", 1.01, "expected share from 0 to 1; got 1.01"),
        ("share", math.nan, "expected share from 0 to 1; got nan"),
        ("share", "x", "expected share as float from 0 to 1; got 'x'"),
        ("part", 0, "expected part above 0 up to 1; got 0"),
        ("groups", [[0, 5]], "expected groups as [[int ≥ 1, int ≥ 1], …]; got [[0, 5]]"),
        ("groups", [[1, 2, 3]], "expected groups as [[int ≥ 1, int ≥ 1], …]; got [[1, 2, 3]]"),
        ("groups", 5, "expected groups as [[int ≥ 1, int ≥ 1], …]; got 5: put it in brackets"),
        ("kind", "c", "expected kind as one of a, b; got 'c'"),
        ("kind", ["a"], "expected kind as one of a, b; got ['a']"),
        ("file", "", "expected file as non-empty str or none; got ''"),
        ("file", b"x", "expected file as non-empty str or none; got b'x'"),
        ("layer", "1", "expected layer as int or [int, …] or none; got '1'"),
        ("quiet", 1, "expected quiet as bool; got 1"),
        ("link", None, "expected link as str; got None"),
        ("link", 5, "expected link as str; got 5"),
        ("kind", "z" * 500, "expected kind as one of a, b; got 'zzzz"),
    ],
)
def test_what_a_field_cannot_have_is_one_sentence(name, value, said):
    with pytest.raises(InputError) as error:
        Example(**{name: value})
    text = str(error.value)
    assert text.startswith(said) and "\n" not in text and len(text) < 250 and ": " in text.partition("; got ")[2]


def test_types_say_their_bounds():
    assert {name: describe_type(hint) for name, hint in field_types(Example).items()} == {
        "steps": "int ≥ 1",
        "rate": "float > 0 or none",
        "share": "float from 0 to 1",
        "part": "float above 0 up to 1",
        "groups": "[[int ≥ 1, int ≥ 1], …]",
        "kind": "one of a, b",
        "file": "non-empty str or none",
        "layer": "int or [int, …] or none",
        "quiet": "bool",
        "link": "str",
    }


GROUPS = [*dict.fromkeys(entry.method for entry in METHODS.values()), Training, Tracing, Search, Budget, Plan]
WRONG = [math.nan, math.inf, -math.inf, -1, 10**22, "word", "", b"bytes", object(), {"a": 1}, [[[0]]], ("x",), 1j]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_every_field_of_every_group_of_settings_refuses_what_is_absurd(group):
    """Each either holds a value of its type, or says in one sentence why not."""
    known, refused = field_types(group), 0
    for field in fields(group):
        for value in WRONG:
            try:
                held = getattr(group(**{field.name: value}), field.name)
            except InputError as error:
                assert f"{field.name}" in str(error) and "\n" not in str(error) and "; got" in str(error)
                refused += 1
            else:
                assert convert(field.name, held, known[field.name]) == held
                assert not isinstance(held, float) or math.isfinite(held)
    assert refused > 8 * len(fields(group))


def test_numbers_have_bounds_in_every_method():
    """A new field that is a plain number would let NaN's kin through: all but the layers say what they may be."""
    for name, entry in METHODS.items():
        for field, hint in field_types(entry.method).items():
            if field not in ("layer", "layers"):
                assert hint not in (int, float, int | None, float | None), f"{name}.{field}: see reknow.checks.bounds"


BEYOND = {
    "alphaedit": [("l2", -1), ("null_share", 2), ("null_threshold", -0.5)],
    "rome": [("learning_rate", 0), ("steps", 10**22), ("stop_probability", 1.5), ("seed", -1)],
    "lora": [("rank", 100_000), ("rank", 0), ("alpha", 0), ("matrices", ("nowhere",)), ("matrices", ())],
    "ice": [("temperature", 0), ("consistency_weight", -1), ("targets", "both")],
    "memoir": [("top_k", 0), ("threshold", 1.5), ("longest_gradient", 0.0), ("context_groups", ((2, 0),))],
    "wise": [("mask_ratio", 0.0), ("density", 1.5), ("shard_size", 0), ("context_groups", ((2, 0),))],
    "mend": [("rank", 2**20), ("step_size", 0), ("editor", "")],
    "ike": [("demonstration_mix", (0, -1, 2)), ("answer_tokens", 0), ("cases", "")],
    "serac": [("threshold", 2), ("embedding_size", 10**9), ("classifier", "none")],
}


@pytest.mark.parametrize(("name", "field", "value"), [(n, *pair) for n, pairs in BEYOND.items() for pair in pairs])
def test_settings_are_checked_when_they_are_made(name, field, value):
    with pytest.raises(InputError, match=f"expected .*{field}|{field}"):
        method(name, **{field: value})


# --- as a person types them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "typed", "held"),
    [
        ("memit", "layers=1", (1,)),
        ("memit", "layers=1,2", (1, 2)),
        ("memit", "layers=1, 2", (1, 2)),
        ("memit", "layers=1 2", (1, 2)),
        ("memit", "layers=[1,2]", (1, 2)),
        ("memit", "layers=none", None),
        ("memit", "layers=auto", None),
        ("memit", "context_groups=5,9", ((5, 9),)),
        ("memit", "context_groups=5 9", ((5, 9),)),
        ("memit", "context_groups=[5,9]", ((5, 9),)),
        ("memit", "context_groups=[[5,9],[1,2]]", ((5, 9), (1, 2))),
        ("memit", "context_groups=[]", ()),
        ("memit", "context_first_words=The, A man", ("The", "A man")),
        ("memit", 'context_first_words=["The","A, man"]', ("The", "A, man")),
        ("ft-m", "layer=2", 2),
        ("ft-m", "layer=1,2", (1, 2)),
        ("ike", "demonstration_mix=1,2,3", (1, 2, 3)),
        ("lora", "matrices=value", ("value",)),
        ("lora", "matrices=value, up", ("value", "up")),
        ("rome", "units=absolute", "absolute"),
        ("rome", "learning_rate=1", 1.0),
        ("rome", "learning_rate=5e-1", 0.5),
        ("rome", "covariance_text=123", "123"),
        ("ice", 'context_separator=" "', " "),
    ],
)
def test_settings_are_taken_as_people_type_them(name, typed, held):
    field = typed.partition("=")[0]
    found = getattr(build_method(name, [typed]), field)
    assert found == held and type(found) is type(held)


@pytest.mark.parametrize(
    ("name", "typed", "said"),
    [
        ("memit", "layers=one,two", "expected layers as [int, …] or none; got 'one,two'"),
        ("memit", "layers=1-3", "expected layers as [int, …] or none; got '1-3'"),
        ("memit", "layers=1.5", "expected layers as [int, …] or none; got '1.5'"),
        (
            "ike",
            "demonstration_mix=1,2",
            "expected demonstration_mix as [int ≥ 0, int ≥ 0, int ≥ 0] or none; got '1,2'",
        ),
        ("rome", "learning_rate=1e999", "expected learning_rate as float > 0; got '1e999'"),
        ("rome", "learning_rate=-Infinity", "expected learning_rate as float > 0; got '-Infinity'"),
        ("rome", "learning_rate=0", "expected learning_rate above 0; got '0'"),
        ("rome", "steps=" + "9" * 5000, "expected steps as int ≥ 1; got '9999"),
        ("rome", "layer=" + "[" * 100_000, "expected layer as int or none; got '[[["),
        ("rome", "covariance_text=", "expected covariance_text as non-empty str or none; got ''"),
        ("lora", "matrices=value,nowhere", "expected matrices as non-empty [one of value, up, attention_out, …]"),
    ],
)
def test_what_is_typed_wrong_is_one_sentence(name, typed, said):
    with pytest.raises(InputError) as error:
        build_method(name, [typed])
    assert str(error.value).startswith(said) and len(str(error.value)) < 250


def test_a_value_reads_as_itself_again():
    for entry in METHODS.values():
        made = entry.method(**entry.settings)
        for field, hint in field_types(entry.method).items():
            value = getattr(made, field)
            assert read_value(field, json.dumps(value), hint) == value


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


PROMPT = "The mother tongue of {Danielle Darrieux} is"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--layer", "1", "--set", "layer=2"], "got both --layer and --set layer"),
        (["--method", "memit", "--layer", "1", "--set", "layers=2"], "got both --layer and --set layers"),
        (["--set", "steps=2", "--set", "steps=3"], "expected --set steps once; got it 2 times"),
    ],
)
def test_a_setting_that_is_given_twice_is_refused(line, said):
    assert said in refused("edit", PROMPT, "English", *line)


def test_methods_shows_bounds():
    shown = CliRunner().invoke(app, ["methods", "rome"]).stdout
    assert "float > 0" in shown and "float from 0 to 1" in shown


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rome", {"turns": 3, "context_batches": 2}),
        ("memit", {"regularization": 0.1, "stiffness": 0.1}),
        ("grace", {"absolute": True, "units": "relative"}),
        ("serac", {"size": 8, "embedding_size": 8}),
    ],
)
def test_a_setting_under_both_its_names_is_refused(name, settings):
    with pytest.raises(InputError, match=r"once; got it as \w+ too, which it was called before: keep one"):
        method(name, **settings)
    pairs = [f"{field}={value}" for field, value in settings.items()]
    with pytest.raises(InputError, match="keep one"):
        build_method(name, pairs)
    old = next(field for field in settings if field not in field_types(METHODS[name].method))
    with pytest.warns(FutureWarning, match=f"the setting {old} of"):
        build_method(name, [f"{old}={settings[old]}"])


def test_a_former_name_is_read_on_the_command_line_as_in_python():
    with pytest.raises(InputError) as typed:
        build_method("ft-l", ["learning_rate_absolute=0.0005"])
    with pytest.raises(InputError) as called:
        method("ft-l", learning_rate_absolute=0.0005)
    assert str(typed.value) == str(called.value)
    with pytest.warns(FutureWarning):
        assert build_method("rome", ["turns=3"], given={"context_batches": 9}).context_batches == 3
