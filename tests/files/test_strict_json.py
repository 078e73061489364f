"""JSON that is printed or written is read by every parser: no NaN, no infinity."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import reknow
from conftest import make_lm, saved, some_patch
from reknow import LM, Patch
from reknow.cli import app
from reknow.export.adapter import export_lora
from reknow.files.atomic import write_json
from reknow.files.outputs import MARK
from reknow.files.strict_json import finite, strict_json
from reknow.files.tensors import read_tensors
from reknow.patching.stack import save_stack

SOURCE = Path(reknow.__file__).parent


def strict(text: str) -> Any:
    """What a parser reads that knows JSON alone."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_number_is_null():
    value = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": "NaN", "e": True}}
    wanted = {"a": None, "b": [None, [1.5, None]], "c": {"d": "NaN", "e": True}}
    assert finite(value) == wanted and strict(strict_json(value)) == wanted
    assert strict_json({"é": [1, 2.5]}, indent=1, ensure_ascii=False) == '{\n "é": [\n  1,\n  2.5\n ]\n}'


def test_files_and_notes_of_patches(tmp_path):
    assert strict(write_json(tmp_path / "x.json", {"loss": math.nan}).read_text()) == {"loss": None}
    patch = some_patch(make_lm("gpt2"))
    patch.notes["losses"] = [math.inf, 0.5]
    patch.save(tmp_path / "x.patch")
    [header] = [text for text in read_tensors(tmp_path / "x.patch").metadata.values() if text.startswith("{")]
    assert strict(header)["notes"]["losses"] == [None, 0.5]
    assert Patch.load(tmp_path / "x.patch").id == patch.id


@pytest.fixture(scope="module")
def wrecked(tmp_path_factory) -> Path:
    """A stack whose model gives no numbers, and a patch that was made with a loss that was none."""
    folder = tmp_path_factory.mktemp("wrecked")
    model = saved(folder / "model", "gpt2")
    patch = some_patch(LM(model), size=1e20)
    patch.notes["losses"] = [math.nan]
    return save_stack(folder / "stack", model, [patch])


def said(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (0, 1), result.output
    return strict(result.stdout)


def test_check_of_a_stack_without_a_limit_of_its_norm(tmp_path):
    model = saved(tmp_path / "model", "gpt2")
    found = said("check", save_stack(tmp_path / "stack", model, [some_patch(LM(model))]), "--json")
    [norm] = [one for one in found["limits"] if one["name"] == "norm"]
    assert norm["limit"] is None and norm["kept"] is True and norm["value"] > 0


@pytest.mark.parametrize("command", ["verify", "show", "log"])
def test_commands_on_a_wrecked_model(wrecked, command):
    assert said(command, wrecked, "--json")


def test_answers_of_a_wrecked_model(wrecked):
    assert said("ask", "The capital of Peru is", "--stack", wrecked, "--json", "--beside")


def test_the_record_of_a_wrecked_export(wrecked, tmp_path):
    lm = make_lm("gpt2")
    lm.apply(some_patch(lm, size=1e30))
    export_lora(lm, tmp_path / "out")
    assert strict((tmp_path / "out" / MARK).read_text())
    assert said("show", tmp_path / "out", "--json")


NOT_WRITTEN = {"files/tensors.py", "serving/app.py", "studies/ice/convergence_page.py"}
NOT_WRITTEN |= {"datasets/reading.py", "datasets/records.py", "patching/record.py"}
"""Headers of tensors, whose values are those of settings, with bounds; what is streamed, which holds no numbers but
counts; parts of sentences; how long a memory's settings are."""


def dumped() -> Iterator[str]:
    """Files that make JSON which is neither a key, nor read again at once, nor a part of a sentence."""
    for file in SOURCE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inner = {
            id(call)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hashlib.sha256", "json.loads", "parse_json")
            for call in ast.walk(node)
        }
        inner |= {id(c) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for c in ast.walk(n)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                strictly = any(word.arg == "allow_nan" for word in node.keywords)
                if not strictly and id(node) not in inner:
                    yield file.relative_to(SOURCE).as_posix()


def test_nothing_else_writes_json():
    assert {name for name in dumped() if name not in NOT_WRITTEN} == {"evaluation/runner.py"} - {
        "evaluation/runner.py"
    }
