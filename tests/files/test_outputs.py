"""What a command may replace: regular files, and folders that it wrote; never what it reads from."""

from __future__ import annotations

import json
import os
import stat

import pytest
from typer.testing import CliRunner

from conftest import make_lm, some_patch
from reknow import LM
from reknow.cli import app
from reknow.cli.places import trace_place
from reknow.errors import InputError
from reknow.export.adapter import export_lora
from reknow.export.checkpoint import export_checkpoint
from reknow.files.atomic import atomic_write_folder, write_text
from reknow.files.outputs import MARK, growing_folder, output_file, output_folder, stack_folder
from reknow.methods import method
from reknow.patching.stack import save_stack

UNIX = pytest.mark.skipif(os.name == "nt", reason="devices, modes and home folders of Unix")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A tiny model in a folder."""
    folder, lm = tmp_path_factory.mktemp("base"), make_lm("llama")
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def patch(base):
    return some_patch(LM(base))


def files(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


# --- files -----------------------------------------------------------------------------------------------


@UNIX
def test_only_regular_files_are_replaced(here, patch):
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    os.mkdir("folder")
    patch.save("a.patch")
    for place in ("/dev/null", "/dev/full", "pipe", "link", "folder"):
        with pytest.raises(InputError, match="expected a file to replace"):
            write_text(place, "text")
        assert "expected a file to replace" in refused("merge", "a.patch", "--out", place, "--force")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert sorted(os.listdir()) == ["a.patch", "folder", "link", "pipe"]


@UNIX
def test_a_link_stays_and_what_it_names_is_replaced(here):
    os.mkdir("elsewhere")
    write_text("elsewhere/file", "old")
    os.symlink("elsewhere/file", "link")
    write_text("link", "new")
    assert os.readlink("link") == "elsewhere/file" and (here / "elsewhere" / "file").read_text() == "new"
    os.symlink("elsewhere", "folder")
    atomic_write_folder("folder", lambda new: write_text(new / "file", "newer") and None, overwrite=True)
    assert os.readlink("folder") == "elsewhere" and (here / "elsewhere" / "file").read_text() == "newer"


def test_what_is_read_is_not_replaced(here, base, patch):
    save_stack("stack", base, [patch])
    patch.save("a.patch")
    before = files(here)
    for arguments in (
        ("merge", "a.patch", "--out", "a.patch"),
        ("merge", "a.patch", "--out", "stack/../a.patch"),
        ("edit", "The capital of {Peru} is", "Paris", "--model", base, "--out", f"{base}/config.json"),
        ("edit", "The capital of {Peru} is", "Paris", "--model", "stack", "--out", "stack/stack.json"),
        ("edit", "The capital of {Peru} is", "Paris", "--model", "stack", "--out", f"{base}/model.safetensors"),
        ("export", "stack", "stack", "--to", "hf"),
        ("export", "stack", base, "--to", "lora"),
        ("export", "a.patch", base, "--to", "hf", "--model", base),
        ("export", "stack", ".", "--to", "hf"),
    ):
        assert "apart from what is read" in refused(*arguments, "--force"), arguments
    assert files(here) == before


@UNIX
@pytest.mark.parametrize(
    ("name", "why"),
    [("x" * 256, "too long"), ("~nobody-at-all/x", "home"), ("a\0b", "null"), ("file/x", "not a directory")],
)
def test_names_that_cannot_be_written_are_refused_at_the_door(here, patch, name, why):
    write_text("file", "text")
    for check in (
        lambda: output_file(here / name if "~" not in name else name, False),
        lambda: output_folder(here / name if "~" not in name else name, False, lambda _: set()),
        lambda: growing_folder(here / name if "~" not in name else name, "bench", own=(), written=()),
        lambda: stack_folder(here / name if "~" not in name else name),
    ):
        with pytest.raises(InputError, match=f"(?i)expected a name to write to.*{why}"):
            check()


def test_a_home_folder_is_resolved_and_long_names_fit(here, base, patch, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    assert output_file("~/x.patch", False) == here / "x.patch"
    patch.save(here / "a.patch")
    merge = ["merge", "a.patch", "--out", "~/b.patch"]
    assert CliRunner().invoke(app, merge).exit_code == 0 and "b.patch exists" in refused(*merge)
    export = ["export", "b.patch", "~/out", "--to", "lora", "--model", base, "--force"]
    assert [CliRunner().invoke(app, export).exit_code for _ in range(2)] == [0, 0]
    assert sorted(os.listdir()) == ["a.patch", "b.patch", "out"]
    write_text(here / ("x" * 255), "as long as names may be")
    write_text(here / ("x" * 255), "twice")
    assert (here / ("x" * 255)).read_text() == "twice"


@UNIX
@pytest.mark.skipif(os.name != "nt" and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_refused_at_the_door(here):
    os.mkdir("closed", 0o500)
    with pytest.raises(InputError, match="may not be written to"):
        output_file(here / "closed" / "x.patch", False)


# --- folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [export_checkpoint, export_lora])
def test_only_an_export_is_replaced_by_one(here, base, patch, export):
    lm = LM(base)
    lm.apply(patch)
    for name in ("home", "sft", "other"):
        os.mkdir(name)
    os.mkdir("home/letters")
    write_text("home/letters/dear.txt", "years of work")
    write_text("sft/adapter_config.json", "{}")  # a user's own adapter looks like ours but for the mark
    write_text("sft/adapter_model.safetensors", "a night of training")
    write_text(f"other/{MARK}", json.dumps({"written_by": "something else", "files": ["x"]}))
    before = files(here)
    for name in ("home", "sft", "other"):
        with pytest.raises(InputError, match="holds something else"):
            export(lm, name, overwrite=True)
    assert files(here) == before
    os.mkdir("empty")
    export(lm, "empty", overwrite=True)
    export(lm, "empty", overwrite=True)
    write_text("empty/notes.md", "what I found out")
    with pytest.raises(InputError, match=r"something else, notes\.md"):
        export(lm, "empty", overwrite=True)
    os.unlink("empty/notes.md")
    assert json.loads((here / "empty" / MARK).read_text())["patches"][0]["id"] == patch.id
    with pytest.raises(InputError, match="apart from what is read"):
        export(LM(base), base, overwrite=True) if export is export_checkpoint else export(lm, base, overwrite=True)


def test_the_folder_one_is_in_is_not_replaced(here, base, patch, monkeypatch):
    lm = LM(base)
    lm.apply(patch)
    export_lora(lm, here / "adapter")
    monkeypatch.chdir(here / "adapter")
    with pytest.raises(InputError, match="other than the one you are in"):
        export_lora(lm, ".", overwrite=True)


def test_the_folder_of_an_adapter_patch_takes_the_place_of_its_like_only(here, base):
    lm = LM(base)
    tuned = method("lora", layers=(1,), steps=1).edit(lm, [some_patch(lm).edits[0]])
    tuned.save("x.patch")
    tuned.save("x.patch")
    write_text("x.patch/notes.md", "what I found out")
    with pytest.raises(InputError, match=r"something else, notes\.md"):
        tuned.save("x.patch")
    edit = ["edit", "The capital of {Peru} is", "Paris", "--model", base, "--method", "lora", "--force"]
    assert "something else, notes.md" in refused(*edit, "--out", "x.patch")  # before any work
    assert (here / "x.patch" / "notes.md").read_text() == "what I found out"


def test_a_stack_goes_into_a_folder_of_its_own(here, base, patch):
    patch.save("a.patch")
    before = files(here)
    for arguments in ((".", "--model", base), (base, "--model", base), (base, "--model", "demo:gpt2")):
        found = refused("apply", "a.patch", "--stack", *arguments) if arguments[0] != "." else ""
        assert "holds something else" in found or arguments[0] == "."
    with pytest.raises(InputError, match="holds something else"):
        save_stack(base, base, [patch])
    assert files(here) == before and "stack.json" not in os.listdir(base)
    os.mkdir("killed")  # before its list was written
    patch.save(f"killed/{patch.id}.patch")
    save_stack("killed", base, [patch])
    save_stack("killed", base, [])


# --- modes -----------------------------------------------------------------------------------------------


@UNIX
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_are_those_of_the_users_other_files(here, base, patch, umask):
    before = os.umask(umask)
    try:
        lm = LM(base)
        tuned = method("lora", layers=(1,), steps=1).edit(lm, [patch.edits[0]])
        lm.apply(patch)
        export_checkpoint(lm, "hf")
        export_lora(lm, "lora")
        tuned.save("tuned.patch")
        save_stack("stack", base, [patch, tuned])
    finally:
        os.umask(before)
    for path in here.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


# --- folders that grow -----------------------------------------------------------------------------------

GROWING = {
    "bench": (["bench", "--limit", "1"], "cases.jsonl"),
    "bench, a report": (["bench", "--limit", "1"], "report.md"),
    "bench, a figure": (["bench", "--limit", "1"], "figure_locality.png"),
    "demo": (["demo"], "before.jsonl"),
    "train": (["train", "mend"], "editor.safetensors"),
    "study": (["study", "tasks"], "tasks.md"),
    "instruct": (["instruct"], "instructions.json"),
    "trace, a picture": (["trace", "{Peru} is"], "trace.svg"),
    "trace, traces": (["trace"], "traces.jsonl"),
    "trace, traces by force": (["trace", "--force"], "traces.jsonl"),
}


@pytest.mark.parametrize("name", GROWING)
def test_files_from_elsewhere_are_not_written_over(here, base, name):
    """Refused before a model is opened, so that nothing is computed in vain."""
    command, file = GROWING[name]
    write_text(f"mine/{file}", "years of work")
    found = refused(*command, "--model", base, "--out", "mine")
    assert file in found and ("from elsewhere" in found or "something else" in found)
    assert os.listdir("mine") == [file] and (here / "mine" / file).read_text() == "years of work"
    assert "is read from" in refused(*command, "--model", base, "--out", base)
    write_text("file", "no folder")
    assert "expected a folder" in refused(*command, "--model", base, "--out", "file")
    assert "too long" in refused(*command, "--model", base, "--out", "x" * 256)


def test_a_folder_is_taken_up_again_by_what_wrote_there(here, base):
    trace = ["trace", "The capital of {Peru} is", "--model", base, "--samples", "2", "--out", "traced"]
    for _ in range(2):
        result = CliRunner().invoke(app, trace)
        assert result.exit_code == 0, result.output
    assert sorted(os.listdir("traced")) == [MARK, "trace.png", "trace.svg"]
    os.unlink(f"traced/{MARK}")  # as versions before left it
    assert "trace.png from elsewhere" in refused(*trace)
    assert trace_place(here / "traced", base, force=True) == here / "traced"


def test_a_report_goes_elsewhere_and_there_again(here, base):
    quick = ["--methods", "ft-m", "--set", "steps=1", "--set", "layer=1", "--no-fluency", "--no-generate"]
    result = CliRunner().invoke(app, ["bench", "--model", base, "--limit", "1", *quick, "--out", "run"])
    assert result.exit_code == 0, result.output
    write_text("paper/report.md", "years of work")
    assert "report.md from elsewhere" in refused("report", "run", "--out", "paper")
    for _ in range(2):
        assert CliRunner().invoke(app, ["report", "run", "--out", "pages"]).exit_code == 0
    assert (here / "paper" / "report.md").read_text() == "years of work"
    assert CliRunner().invoke(app, ["report", "here-is-no-run", "--out", "none"]).exit_code == 2
    assert not os.path.exists("none")
