"""Several processes at once, and processes that are killed: nothing is lost, nothing is there twice."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_lm, some_patch
from learned import SETTINGS, TRAINING, some_cases
from reknow import FT, Case, Edit, Patch, Probe, method
from reknow.editing.layer_choice import FILE, LayerScore, keep_scores
from reknow.errors import InputError, PatchError, ReknowError
from reknow.evaluation import Results, bench
from reknow.evaluation.run_folder import BEFORE_FILE, ROWS_FILE
from reknow.files.atomic import write_text
from reknow.files.locks import write_lock
from reknow.files.manifest import MANIFEST_FILE
from reknow.learning.loop import LOG_FILE
from reknow.patching.stack import read_history, read_stack, save_stack

pytestmark = pytest.mark.slow

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["reknow.evaluation", "reknow.cli.app", "reknow.methods", "conftest", "learned"])
CASES = [
    Case(
        Edit("The capital of {} is", subject=subject, target_new=new, target_true="Lima", id=subject),
        (Probe("Beats Music is owned by", ("Apple",), "locality", "other"),),
    )
    for subject, new in (("Peru", "Paris"), ("France", "Apple"), ("Apple", "Zoë"))
]
METHOD = FT(layer=1, steps=2)


def together(work: Callable, *calls: Sequence) -> list:
    """What the work gives or refuses in as many processes, which begin together."""
    barrier, found = PROCESSES.Barrier(len(calls)), PROCESSES.SimpleQueue()
    processes = [
        PROCESSES.Process(target=_begin, args=(barrier, found, number, work, arguments))
        for number, arguments in enumerate(calls)
    ]
    for process in processes:
        process.start()
    results = dict(found.get() for _ in processes)
    for process in processes:
        process.join()
    return [results[number] for number in range(len(calls))]


def _begin(barrier, found, number: int, work: Callable, arguments: Sequence) -> None:
    barrier.wait()
    try:
        result = work(*arguments)
    except ReknowError as error:
        result = error
    found.put((number, result))


def killed(work: Callable, *arguments: object) -> bool:
    """Whether the work ended in a process by being killed."""
    process = PROCESSES.Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the lock ------------------------------------------------------------------------------------------------


def held(place: Path, pipe) -> None:
    with write_lock(place):
        pipe.send("ready")
        pipe.recv()


@pytest.fixture
def other(tmp_path):
    """A place, another process that writes there, and what makes it end."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=held, args=(tmp_path / "place", theirs))
    process.start()
    assert ours.recv() == "ready"
    yield tmp_path / "place", process, lambda: ours.send("done")
    ours.send("done")
    process.join()


def test_a_second_writer_is_told_who_writes(other, tmp_path):
    place, process, _ = other
    message = f"expected nobody else to write to .*; process {process.pid} does: wait"
    with pytest.raises(InputError, match=message), write_lock(place):
        pytest.fail("both write")
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(InputError, match=str(process.pid)), write_lock(tmp_path / "link"):
        pytest.fail("another name is the same folder")


def test_who_waits_says_so_and_gets_its_turn(other, caplog):
    place, process, done = other
    threading.Timer(1.5, done).start()
    with caplog.at_level(logging.WARNING), write_lock(place, wait=60):
        pass
    assert [f"waiting for process {process.pid}, which writes to {place}"] == caplog.messages


def test_a_lock_dies_with_its_process(other, tmp_path):
    place, process, _ = other
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with write_lock(place):
        assert files(tmp_path) == [".place.lock"]
    assert files(tmp_path) == []


def test_a_thread_may_ask_again_and_another_may_not(tmp_path):
    refused = []

    def ask():
        try:
            with write_lock(tmp_path / "run"):
                pass
        except InputError as error:
            refused.append(str(error))

    with write_lock(tmp_path / "run"), write_lock(tmp_path / "run"):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} does" in refused[0]
    ask()
    assert len(refused) == 1 and files(tmp_path) == []


def counted(file: Path, times: int) -> None:
    for _ in range(times):
        with write_lock(file, wait=60):
            number = int(file.read_text()) if file.exists() else 0
            file.write_text(str(number + 1))


def test_the_lock_file_goes_and_nobody_slips_in(tmp_path):
    """Who waits for a lock whose file was deleted takes a new one, so two never hold it."""
    together(counted, *[(tmp_path / "number", 50)] * 4)
    assert (tmp_path / "number").read_text() == "200" and files(tmp_path) == ["number"]


def read_without_rights(folder: Path, results) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    for path in (folder, *folder.iterdir()):
        assert not os.access(path, os.W_OK)
    with write_lock(folder / "stack"):  # nobody can write there, so there is nothing to guard
        results.put(len(read_stack(folder / "stack")[1]))
    with write_lock(folder / "run"):
        results.put(len(Results.load(folder / "run").rows))


def test_folders_that_cannot_be_written_are_read(lm):
    folder = Path(tempfile.mkdtemp())
    try:
        save_stack(folder / "stack", "base", [some_patch(lm)])
        bench(lm, CASES, [METHOD], folder / "run")
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        results = PROCESSES.SimpleQueue()
        process = PROCESSES.Process(target=read_without_rights, args=(folder, results))
        process.start()
        process.join()
        assert process.exitcode == 0 and (results.get(), results.get()) == (1, len(CASES))
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_folders_made_for_a_lock_go_with_it(tmp_path):
    with pytest.raises(KeyError), write_lock(tmp_path / "runs" / "first" / "run"):
        assert files(tmp_path / "runs" / "first") == [".run.lock"]
        raise KeyError
    assert files(tmp_path) == []
    with write_lock(tmp_path / "runs" / "first"):
        (tmp_path / "runs" / "mine").write_text("kept")
    assert files(tmp_path / "runs") == ["mine"]


def test_what_cannot_be_locked_is_refused_by_whoever_writes(tmp_path):
    """A folder that is a file, a name that is too long: there is nothing to guard."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", tmp_path / ("long" * 70) / "run"):
        with write_lock(place), pytest.raises(InputError, match="could not be written"):
            write_text(place, "")
    (tmp_path / ".run.lock").mkdir()
    with (
        pytest.raises(InputError, match=r"expected .*\.run\.lock, which says who writes"),
        write_lock(tmp_path / "run"),
    ):
        pytest.fail("the lock is somebody's folder")


# --- stacks --------------------------------------------------------------------------------------------------


def command(*words: object) -> tuple[int, str]:
    """Status and standard output of a command in this process."""
    from reknow.cli import app

    said = io.StringIO()
    with redirect_stdout(said), pytest.raises(SystemExit) as end:
        app([str(word) for word in words])
    return int(end.value.code or 0), said.getvalue()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model in a folder, and the files of five patches for it."""
    folder, lm = tmp_path_factory.mktemp("saved"), make_lm("gpt2")
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    patches = [some_patch(lm, seed) for seed in range(5)]
    return folder / "model", {patch.id: patch.save(folder / f"{patch.id}.file") for patch in patches}


@pytest.mark.parametrize("trial", range(3))
def test_patches_that_are_applied_at_once_are_all_there(saved, tmp_path, trial):
    """On a stack that is there, and on one that the first of them makes."""
    model, patches = saved
    stack, new = tmp_path / "stack", trial == 0
    if not new:
        save_stack(stack, str(model), [])
    base = ["--model", model] if new else []
    said = together(command, *[("apply", file, "--stack", stack, *base) for file in patches.values()][:4])
    assert [(status, "applied" in text) for status, text in said] == [(0, True)] * 4
    assert {patch.id for patch in read_stack(stack)[1]} == set(list(patches)[:4])
    ids = list(patches)
    reverts = [("revert", each, "--stack", stack) for each in ids[:3]]
    said = together(command, *reverts, ("apply", patches[ids[4]], "--stack", stack))
    assert [status for status, _ in said] == [0] * 4
    assert [patch.id for patch in read_stack(stack)[1]] == [ids[3], ids[4]]
    lines = read_history(stack)[0 if new else 1 :]
    assert [line.problem for line in lines] == [None] * 8
    done = [(line.entry.action, *[one.id for one in line.entry.applied], *line.entry.reverted) for line in lines]
    applied, reverted = [("apply", one) for one in ids], [("revert", one) for one in ids[:3]]
    assert sorted(done[:4]) == sorted(applied[:4]) and sorted(done[4:]) == sorted([*reverted, applied[4]])
    assert files(tmp_path) == ["stack"] and not [name for name in files(stack) if name.startswith(".")]


def test_a_file_that_is_there_already_is_looked_at(lm, tmp_path):
    """Another patch of that name, a torn one, a folder that is none: what is applied is what was given."""
    right, wrong = some_patch(lm, 0), some_patch(lm, 1)
    for make in (
        lambda file: wrong.save(file),
        lambda file: file.write_bytes(right.save(tmp_path / "whole").read_bytes()[:-9]),
        lambda file: file.write_text("{}"),
        lambda file: file.write_bytes(b""),
    ):
        stack = tmp_path / "stack"
        shutil.rmtree(stack, ignore_errors=True)
        stack.mkdir()
        make(stack / f"{right.id}.patch")
        save_stack(stack, "base", [right])
        assert [patch.id for patch in read_stack(stack)[1]] == [right.id]
    shutil.rmtree(stack)
    (stack / f"{right.id}.patch").mkdir(parents=True)
    (stack / f"{right.id}.patch" / "notes").write_text("mine")
    with pytest.raises(InputError):
        save_stack(stack, "base", [right])
    assert (stack / f"{right.id}.patch" / "notes").read_text() == "mine"


def test_a_patch_under_another_name_is_no_patch_of_the_stack(lm, tmp_path):
    right, wrong = some_patch(lm, 0), some_patch(lm, 1)
    save_stack(tmp_path, "base", [right])
    wrong.save(tmp_path / f"{right.id}.patch")
    with pytest.raises(PatchError, match=f"expected the patch {right.id} in .*; it holds patch {wrong.id}"):
        read_stack(tmp_path)


# --- runs ----------------------------------------------------------------------------------------------------


def run(folder: Path, settings: FT = METHOD) -> str:
    bench(make_lm("gpt2"), CASES, [settings], folder)
    return "done"


def keys(file: Path) -> Counter:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return Counter((row.get("method"), row["case"]) for row in rows)


def whole(folder: Path) -> bool:
    """Whether every row is there once."""
    once = [Counter({(name, case.edit.id): 1 for case in CASES}) for name in (None, "ft-m")]
    return [keys(folder / BEFORE_FILE), keys(folder / ROWS_FILE)] == once


@pytest.mark.parametrize("others", [METHOD, replace(METHOD, steps=3)], ids=["same settings", "other settings"])
def test_one_run_writes_to_a_folder(tmp_path, others):
    folder = tmp_path / "run"
    results = together(run, (folder, METHOD), (folder, others), (folder, others))
    refused = [str(result) for result in results if result != "done"]
    assert (
        whole(folder)
        and files(tmp_path) == ["run"]
        and files(folder) == sorted([BEFORE_FILE, ROWS_FILE, MANIFEST_FILE])
    )
    for message in refused:  # one that came when another was through took up its run, if its settings were the same
        assert message.startswith(("expected nobody else to write", "expected the settings with which"))
    steps = {json.loads((folder / MANIFEST_FILE).read_text())["settings"]["methods"]["ft-m"]["steps"]}
    assert steps <= {METHOD.steps, others.steps} and len(refused) < 3


def test_readers_leave_what_is_being_written(tmp_path, lm):
    """A row that is half written is passed over, and its writer ends it."""
    bench(lm, CASES, [METHOD], tmp_path / "run")
    file = tmp_path / "run" / ROWS_FILE
    content = file.read_bytes()
    for end in range(len(content) - 200, len(content)):
        file.write_bytes(content[:end])
        before = file.stat()
        assert len(Results.load(tmp_path / "run").rows) == len(CASES) - 1
        assert (file.read_bytes(), file.stat().st_mtime_ns) == (content[:end], before.st_mtime_ns)


def cut_short(number: int, torn: bool, work: Callable, *arguments: object) -> None:
    """Does the work, and is killed as the number-th line is written: before a sync, or in the midst of the line."""
    own, left = os.fsync, number

    def sync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if torn and name.endswith(".jsonl"):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - 7)
            os.kill(os.getpid(), signal.SIGKILL)
        own(descriptor)

    os.fsync = sync
    work(*arguments)


@pytest.mark.parametrize("torn", [False, True], ids=["before the sync", "in the midst of the line"])
def test_a_run_that_is_killed_at_any_row_has_them_all_once(tmp_path, torn):
    run(tmp_path / "whole")
    for number in range(1, 2 + 2 * len(CASES)):  # the manifest, and a row of each case before and after its edit
        folder = tmp_path / str(number)
        assert killed(cut_short, number, torn, run, folder)
        if number > 1:
            assert len(Results.load(folder).rows) <= number  # a reader finds its way
        run(folder)
        assert whole(folder) and read_values(folder / ROWS_FILE) == read_values(tmp_path / "whole" / ROWS_FILE)


def read_values(file: Path) -> list[dict]:
    costs = ("seconds", "peak_memory_mb")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in costs} for row in rows]


# --- training ------------------------------------------------------------------------------------------------

SHORT = replace(TRAINING, steps=6, validate_every=2, checkpoint_every=3)


def learn(folder: Path) -> str:
    made = method("mend", **SETTINGS["mend"])
    made.fit(make_lm("gpt2"), some_cases(24), folder, SHORT)  # type: ignore[attr-defined]
    return "done"


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / LOG_FILE).read_text().splitlines()]


def test_one_training_writes_to_a_folder(tmp_path):
    results = together(learn, (tmp_path / "mend",), (tmp_path / "mend",))
    assert "done" in results and steps(tmp_path / "mend") == [2, 4, 6]
    assert all(result == "done" or "expected nobody else to write" in str(result) for result in results)
    assert files(tmp_path / "mend") == ["editor.safetensors", "log.jsonl", "manifest.json"]


def test_a_training_that_is_killed_at_every_sync_logs_every_step_once(tmp_path):
    killings = sum(killed(cut_short, 2, number % 2 == 0, learn, tmp_path / "mend") for number in range(6))
    learn(tmp_path / "mend")
    assert killings >= 3 and steps(tmp_path / "mend") == [2, 4, 6]
    learn(tmp_path / "whole")
    editors = [load_file(tmp_path / each / "editor.safetensors") for each in ("mend", "whole")]
    assert editors[0].keys() == editors[1].keys()
    assert all(torch.equal(tensor, editors[1][name]) for name, tensor in editors[0].items())


# --- the cache -----------------------------------------------------------------------------------------------


def choose(cache: Path, seed: int) -> str:
    os.environ["REKNOW_CACHE"] = str(cache)
    lm = make_lm("gpt2", seed=seed)
    keep_scores(lm, [LayerScore(1, 0.0, 1.0, 1.0, 1.0)])
    return lm.fingerprint.digest


def test_layers_that_are_chosen_at_once_are_all_kept(tmp_path):
    models = together(choose, *[(tmp_path, seed) for seed in range(4)])
    kept = set(json.loads((tmp_path / FILE).read_text()))
    assert kept == set(models) and len(kept) == 4 and files(tmp_path) == [FILE]


def count(cache: Path) -> list[str]:
    from reknow.editing.covariance import statistics

    os.environ["REKNOW_CACHE"] = str(cache)
    found = statistics(make_lm("gpt2"), [0, 1], tokens=2_000)
    return [one.file.name for one in found.values()]


def test_statistics_that_are_wanted_at_once_are_read_once(tmp_path):
    names, *others = together(count, *[(tmp_path,)] * 3)
    assert all(each == names for each in others) and files(tmp_path) == sorted(names)


def test_a_patch_file_is_made_by_one_command(saved, tmp_path):
    """Two edits of one subject would take the same file."""
    one, *rest = saved[1].values()
    merged = [("merge", one, other, "--out", tmp_path / "out") for other in rest]
    said = together(command, *merged[:3])
    assert Counter(status for status, _ in said) == {0: 1, 2: 2}
    (label,) = [text for status, text in said if status == 0]
    assert Patch.load(tmp_path / "out").id in label and files(tmp_path) == ["out"]
