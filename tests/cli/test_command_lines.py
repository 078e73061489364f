"""Command lines of every kind: status 0 or 2, one line for what is wrong, and output that is anything or nowhere."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import make_lm, saved, some_patch
from reknow import cli
from reknow.cli import app, terminal
from reknow.cli.app import app as commands
from reknow.cli.app import main
from reknow.patching.stack import save_stack

pytestmark = pytest.mark.usefixtures("empty_folder")


def refused(*arguments: str) -> str:
    """The one line of a command that must be refused, without `error: `."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, (arguments, result.output, result.exception)
    assert result.stdout == "" and result.stderr.count("\n") == 1, (arguments, result.output)
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")


USAGE = {
    "edlt": "No such command 'edlt'. Did you mean 'edit'? (see `reknow --help`)",
    "Bench": "No such command 'Bench'. Did you mean 'bench'? (see `reknow --help`)",
    "xyz": "No such command 'xyz' (see `reknow --help`)",
    "--verbos edit": "No such option: --verbos",
    "edit --modle x": "No such option: --modle (Possible options: ",
    "edit a b c": "Got unexpected extra argument(s) (c) (see `reknow edit --help`)",
    "edit --out": "Option '--out' requires an argument",
    "edit --force=yes a b": "Option '--force' does not take a value",
    "train": "Missing argument 'method' (see `reknow train --help`)",
    "apply x.patch": "Missing option '--stack'",
    "bench --limit many": "expected '--limit' to be a valid integer; got 'many': see `reknow bench --help`",
    "bench --limit 0": "expected '--limit' to be greater than or equal to 1; got '0'",
    "bench --limit -1": "expected '--limit' to be greater than or equal to 1; got '-1'",
    "bench --limit 1.5": "expected '--limit' to be a valid integer; got '1.5'",
    "study tasks --test 1": "expected '--test' to be greater than or equal to 2; got '1'",
    "export a b --to lora --max-rank 0": "expected '--max-rank' to be greater than or equal to 1; got '0'",
    "trace --samples ten": "expected '--samples' to be a valid integer; got 'ten'",
}


@pytest.mark.parametrize("line", USAGE)
def test_wrong_words_are_one_line_with_a_remedy(line):
    assert refused(*line.split()).startswith(USAGE[line])


EMPTY = {
    "stats --text": "'--text'",
    "stats --layers": "'--layers'",
    "edit --out": "'--out'",
    "edit --file": "'--file'",
    "edit a b --set": "'--set'",
    "edit a b --layer": "'--layer'",
    "bench --data": "'--data'",
    "bench --seeds": "'--seeds'",
    "bench --out": "'--out'",
    "train mend --without": "'--without'",
    "trace --out": "'--out'",
    "instruct --families": "'--families'",
    "show": "'source'",
    "report": "'run'",
    "revert --stack s": "'patches'",
    "merge --out m.patch a.patch": "'patches'",
    "methods": "'name'",
}


@pytest.mark.parametrize("line", EMPTY)
def test_an_empty_value_is_not_the_current_folder(line, empty_folder):
    said = refused(*line.split(), "")
    assert said == f"expected {EMPTY[line]} with a value; got an empty one: fill it in, or leave it out"
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("place", ["show {}", "edit {} b", "edit a b --out {}", "{}", "stats --text {}"])
@pytest.mark.parametrize("text", ["\udcff.patch", "caf\udce9", "\ud83d", "a\udc80\udc81b"])
def test_arguments_that_are_no_text_are_refused(place, text):
    assert refused(*place.format(text).split()).startswith(f"expected arguments in UTF-8; got {text!r}: ")


CONTRADICTORY = {
    "export a b --to hf --max-rank 3": ("--to hf", "--max-rank"),
    "export a b --to hf --truncate": ("--to hf", "--truncate"),
    "export stack b --to hf --model demo:gpt2": ("a stack", "--model"),
    "trace {Peru} --facts lre": ("one prompt", "--facts"),
    "trace {Peru} --limit 100": ("one prompt", "--limit"),
    "trace {Peru} --layers": ("--layers", "a prompt"),
    "trace --layers --severed --window 3": ("--layers", "--severed and --window"),
    "instruct --editor e --trial-steps 40": ("a trained --editor", "--trial-steps"),
    "instruct --rounds 0 --proposer p": ("--rounds 0, which proposes nothing,", "--proposer"),
    "instruct --rounds 0 --count 9": ("--rounds 0, which proposes nothing,", "--count"),
    "instruct --rounds 0 --proposals 9": ("--rounds 0, which proposes nothing,", "--proposals"),
    "instruct --timeout 5": ("the built-in rewriter", "--timeout"),
    "study --steps 5": ("the list of studies, which no name gives,", "--steps"),
    "instruct --rounds 0 --server s": ("--rounds 0, which proposes nothing,", "--server"),
    "instruct --temperature 1": ("the built-in rewriter", "--temperature"),
    "bench --list-presets --preset rome": ("--list-presets", "--preset"),
    "bench --list-presets --data zsre --out o": ("--list-presets", "--data and --out"),
    "bench --preset ice-convergence --mode batch": ("--preset ice-convergence", "--mode"),
    "bench --preset ice-convergence --no-generate": ("--preset ice-convergence", "--generate or --no-generate"),
}


@pytest.mark.parametrize("line", CONTRADICTORY)
def test_options_that_contradict_each_other_are_refused_before_any_work(line, empty_folder):
    save_stack(empty_folder / "stack", "demo:gpt2", [])
    what, other = CONTRADICTORY[line]
    said = refused(*line.split())
    assert said.startswith(f"expected {what}") and f"; got {other} too, which it" in said
    assert [path.name for path in empty_folder.iterdir()] == ["stack"]


def test_a_setting_given_twice_and_the_data_of_another_study_are_refused():
    said = refused("edit", "{Peru} is", "Lima", "--set", "steps=1", "--set", "steps=2")
    assert said == "expected --set steps once; got it 2 times: keep one"
    assert refused("bench", "--set", "a.b=1", "--set", "a.b=1").startswith("expected --set a.b once; ")
    said = refused("bench", "--preset", "rome", "--data", "zsre")
    assert "which are counterfact, or files of theirs; got zsre" in said


def test_without_words_the_help_is_shown():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0 and "Usage: reknow" in result.stdout and "trace" in result.stdout


# --- what nobody foresaw -------------------------------------------------------------------------------------


FAILURES = {
    "a fault": (ZeroDivisionError("division by zero"), "got ZeroDivisionError: division by zero: where is in "),
    "without words": (KeyError(), "got KeyError: where is in "),
    "several lines": (RuntimeError("one\ntwo\n"), "got RuntimeError: one two : where is in "),
    "too deep": (RecursionError("maximum recursion depth"), "got RecursionError: maximum recursion depth"),
    "a file": (PermissionError(13, "Permission denied", "/x"), "got Permission denied at /x: make room"),
    "no room": (OSError(28, "No space left on device"), "got No space left on device: make room"),
    "memory": (MemoryError(), "expected enough memory"),
    "no text": (UnicodeEncodeError("utf-8", "\udc80", 0, 1, "no"), "got UnicodeEncodeError: "),
}


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_escapes_is_one_sentence_and_its_traceback_is_kept(name, monkeypatch, tmp_path):
    error, words = FAILURES[name]

    def broken(*_, **__):
        raise error

    monkeypatch.setattr("reknow.patching.patches.Patch.load", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said = refused("show", "a.patch")
    assert words in said
    kept = [file.read_text() for file in tmp_path.glob("reknow-*.txt")]
    assert len(kept) == ("where is in" in said)
    for text in kept:
        assert "in broken" in text and "Traceback" in text
    with pytest.raises(type(error)):
        CliRunner().invoke(app, ["show", "a.patch", "--debug"], catch_exceptions=False)


def test_a_traceback_that_cannot_be_kept_is_still_one_sentence(monkeypatch):
    monkeypatch.setattr("reknow.patching.patches.Patch.load", lambda path: 1 / 0)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert refused("show", "a.patch").endswith("division by zero: give --debug to see where, and report it")


# --- standard output -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patch(tmp_path_factory) -> str:
    return str(some_patch(make_lm()).save(tmp_path_factory.mktemp("patch") / "a.patch"))


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash in which `reknow` is the program."""
    source = str(Path(cli.__file__).parents[2])
    given = {**os.environ, "PYTHONPATH": source, **environment}
    program = f'reknow() {{ "{sys.executable}" -m reknow "$@"; }}; set -o pipefail; '
    return subprocess.run(["bash", "-c", program + line], capture_output=True, env=given)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_an_output_without_unicode_gets_escapes(encoding, patch):
    plain = shell(f"reknow show {patch} && reknow show {patch} --json", PYTHONIOENCODING=encoding)
    assert plain.returncode == 0 and plain.stderr == b""
    text = plain.stdout.decode(encoding)
    assert "edit: The capital of Land 0 is \\u2192 Lima" in text
    assert json.loads(text[text.index("\n{") :])["edits"][0]["target_new"] == "Lima"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_json_in_every_encoding(encoding, monkeypatch):
    written, values = io.BytesIO(), {"é": "→ 😀 \udc80"}
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, "backslashreplace", write_through=True))
    terminal.say_json(values)
    assert json.loads(written.getvalue()) == values


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("reknow --help | head -1", 0, b""),
        ("reknow bench --help | true", 0, b""),
        ("reknow --help >&-", 0, b""),
        ("reknow --version >&-", 0, b""),
        ("reknow --help > /dev/full", 2, b"error: expected to write to standard output; got No space left on device"),
        ("reknow edlt 2>&-", 2, b""),
        ("reknow edlt 2>/dev/full", 2, b""),
        ("reknow edlt <&- >&- 2>&-", 2, b""),
    ],
)
def test_an_output_that_ends_early_does_not_break_a_command(line, status, said):
    result = shell(line)
    assert result.returncode == status, result
    assert result.stderr.startswith(said) and result.stderr.count(b"\n") == bool(said), result


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture
def program(monkeypatch, capfdbinary):
    """Runs the program in this process with an output in ASCII; what it wrote."""

    def run(*words: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["reknow", *words])
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii"))
        with pytest.raises(SystemExit) as end:
            main()
        out, err = (part.decode("ascii") for part in capfdbinary.readouterr())
        assert end.value.code == 0, err
        return out, err

    return run


QUICK = ["--method", "ft-m", "--set", "steps=2", "--layer", "1"]


@pytest.mark.slow
def test_commands_that_compute_write_to_an_output_without_unicode(program, model, empty_folder):
    prompt = "Zo\u00eb lives in {Peru}, which is"
    out, _ = program("edit", prompt, "Lima", *QUICK, "--model", model, "--out", "a.patch")
    assert "Zo\\xeb lives in Peru, which is \\u2026" in out and "wrote a.patch" in out
    assert "Zo\\xeb" in program("show", "a.patch")[0]
    assert "\\u2265" in program("methods", "rome")[0] and "\\u2013" in program("methods")[0]
    out, _ = program("trace", prompt, "--model", model, "--samples", "2")
    assert "\\u201cPeru\\u201d" in out and (empty_folder / "trace" / "trace.svg").exists()
    (empty_folder / "own.json").write_text(json.dumps([{"prompt": prompt, "target_new": "Lima"}]))
    bench = ["--data", "own.json", "--methods", "fine=ft-m", "--set", "steps=2", "--set", "layer=1", "--model", model]
    out, _ = program("bench", *bench, "--out", "run", "--no-generate")
    assert "run folder: run" in out
    assert program("report", "run")[0].startswith("report: run/report.html")


def test_a_file_nested_without_end_is_one_line(empty_folder):
    for text in ("[" * 100_000, '{"a":' * 100_000):
        (empty_folder / "deep.json").write_text(text)
        assert "deep.json" in (said := refused("edit", "--file", "deep.json")) and "nested without end" in said


def test_every_command_has_help():
    for name in [command.callback.__name__ for command in commands.registered_commands if command.callback]:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0 and f"Usage: reknow {name}" in result.stdout
