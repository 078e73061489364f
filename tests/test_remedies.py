"""Whatever an error, a warning or a hint tells a user to give exists: options, commands, fields, extras, pages."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import typer.main

import reknow
from reknow.cli import app

SOURCE = Path(reknow.__file__).parent
ROOT = Path(__file__).parent.parent
SPOKEN = {"warn", "warning", "info", "say", "print", "echo", "hint", "refusal", "as_model_error"}
"""Functions that speak to a user, besides errors."""


FUNCTIONS = (ast.FunctionDef, ast.ClassDef)


@cache
def trees() -> dict[str, ast.Module]:
    """File → its source parsed; when a test asks, not when tests are collected."""
    return {
        str(file.relative_to(SOURCE)): ast.parse(file.read_text(encoding="utf-8"))
        for file in sorted(SOURCE.rglob("*.py"))
    }


@cache
def sentences() -> list[tuple[str, str]]:
    """(place, text) of all that is said."""
    return list(_sentences())


def _sentences() -> Iterator[tuple[str, str]]:
    """Of every error, warning and hint what it is made with, {} for what is put in."""
    for file, tree in trees().items():
        for node in ast.walk(tree):
            name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            said = name.endswith(("Error", "Failed", "Refused", "Extra")) or name.lstrip("_") in SPOKEN
            if isinstance(node, ast.Call) and said:
                yield f"{file}:{node.lineno}", " ".join(map(text, node.args))


def text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return " ".join(text(part) for part in ast.iter_child_nodes(node))


def commands() -> dict[str, set[str]]:
    """Command → its options."""
    group = typer.main.get_command(app)
    own = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {
        name: own | {"--help"} | {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def parameters() -> set[str]:
    """Names of all parameters and fields in the library."""
    names: set[str] = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                names.add(node.arg)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def missing(pattern: str, known: set[str]) -> list[str]:
    """Places and names that match and are not known."""
    return [
        f"{place}: {found}"
        for place, said in sentences()
        for found in re.findall(pattern, said)
        if found not in known
    ]


def test_there_is_much_to_look_at():
    assert len(sentences()) > 300
    assert any("--dtype" in said for _, said in sentences()) and any("force=True" in said for _, said in sentences())


def test_options_exist():
    theirs = {"--upgrade", "--head"}  # of pip and Ray
    assert not missing(r"(?<![\w-])(--[a-z][a-z-]*)", set().union(*commands().values()) | theirs)


def test_commands_exist_and_have_the_options_that_follow_them():
    known = commands()
    assert not missing(r"\breknow ([a-z]+)(?= [-–]|`| \{| --|$)", set(known))
    for place, said in sentences():
        for name, rest in re.findall(r"`reknow ([a-z]+)([^`]*)`", said):
            assert set(re.findall(r"--[a-z-]+", rest)) <= known[name], place


def test_fields_and_parameters_exist():
    theirs = {"gguf_file"}  # of transformers
    assert not missing(r"\b([a-z_]+)=(?!=)", parameters() | theirs)


def test_functions_exist():
    from peft import PeftModel
    from transformers import AutoTokenizer, PreTrainedModel

    ours = {node.name for tree in trees().values() for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}
    others = {*dir(PreTrainedModel), *dir(PeftModel), "merge_and_unload", "get_base_model", "len"}
    assert not missing(r"\b([A-Za-z_]+)\((?=[^)]*\))", ours | others)
    assert "gguf_file" in inspect.getsource(AutoTokenizer.from_pretrained)


def test_extras_exist():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for file, tree in trees().items():
        for node in ast.walk(tree):
            name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in ("MissingExtra", "need_server"):
                words = [text(part).strip() for part in node.args]
                package, extra = words[:2] if name == "MissingExtra" else (words[2], words[0])
                if not extra:  # in `need_server`, which hands on what it was given
                    continue
                (packages,) = re.findall(rf"^{extra} = \[(.*)\]$", listed, re.MULTILINE)
                assert f'"{package}>=' in packages, f"{file}:{node.lineno}"


def test_pages_exist():
    for place, said in sentences():
        for page in re.findall(r"\b(docs/[\w/-]+\.md)\b", said):
            assert (ROOT / page).is_file(), place
