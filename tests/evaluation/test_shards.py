"""Shards of a run: the rows of all are those of one process, whoever makes them, in whatever order, however often."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_runner import Nothing, comparable
from typer.testing import CliRunner

from conftest import make_lm, saved
from families import slow_but
from kills import run as run_and_kill
from reknow import FT, Probe
from reknow.cli import app
from reknow.engine.shards import Shard
from reknow.errors import InputError
from reknow.evaluation import Plan, Results, bench
from reknow.evaluation.run_parts import open_run, repair
from reknow.evaluation.tasks import Task, list_tasks
from reknow.files.locks import write_lock
from runs import PLANS, all_rows, make_cases

METHODS = {"fine": FT(layer=2, steps=6, learning_rate=0.17), "other": FT(layer=1, steps=3, learning_rate=0.1)}


pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture(scope="module", params=slow_but(("sequential",), PLANS))
def plan(request) -> Iterator[Plan]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FT, "edits_per_call", 2)
        yield PLANS[request.param]


@pytest.fixture(scope="module")
def lm():
    return make_lm()


def cases():
    return make_cases()


@pytest.fixture(scope="module")
def whole(plan, lm, short_texts, tmp_path_factory) -> tuple[Results, Path]:
    """The run that one process makes, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return bench(lm, cases(), METHODS, folder, plan=plan), folder


def test_the_tasks_of_a_run_have_every_row_once():
    names = [str(number) for number in range(70)]
    for plan in (*PLANS.values(), Plan("sequential", batch_size=3, checkpoints=(6, 69))):
        tasks = list_tasks(names, {"fine": 16, "other": 1}, plan)
        keys = [key for task in tasks for key in task.keys(plan)]
        assert len(set(keys)) == len(keys)
        assert [task.names for task in tasks[:3]] == [tuple(names[:32]), tuple(names[32:64]), tuple(names[64:])]
        shares = [Shard.parse(f"{number}/3").share(tasks) for number in (1, 2, 3)]
        assert sorted(map(str, tasks)) == sorted(str(task) for share in shares for task in share)
    assert str(Task("single", ("a", "b"), "fine", 3)) == "fine, seed 3, a to b"


def test_the_keys_of_the_tasks_are_those_that_a_run_makes_in_that_order(plan, whole):
    results, folder = whole
    tasks = list_tasks(results.manifest["names"], results.manifest["together"], plan)
    files = [folder / "before.jsonl", folder / "cases.jsonl"]
    made = [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]
    names = ("method", "seed", "mode", "stage", "case")
    keys = [tuple(row[name] for name in names if name in row) for row in made]
    assert keys == [key for task in tasks for key in task.keys(plan)]
    assert keys == [*results.before, *results.rows] and results.unfinished is None


def test_shards_in_any_order_have_the_rows_of_one_process(plan, whole, tmp_path):
    whole, _ = whole
    for number in (3, 1, 2):
        part = bench(make_lm(), cases(), METHODS, tmp_path / "parts", plan=plan, shard=f"{number}/3")
        assert (part.unfinished is None) == (number == 2)
    assert all_rows(part) == all_rows(whole)
    assert not (tmp_path / "parts/cases.jsonl").exists()
    loaded = Results.load(tmp_path / "parts")
    assert all_rows(loaded) == all_rows(whole)
    strip = [line for line in loaded.to_csv().splitlines() if ",edit," not in line]
    assert strip == [line for line in whole.to_csv().splitlines() if ",edit," not in line]
    size = {path: path.stat().st_size for path in (tmp_path / "parts").glob("*.jsonl")}
    bench(make_lm(), cases(), METHODS, tmp_path / "parts", plan=plan)
    bench(make_lm(), cases(), METHODS, tmp_path / "parts", plan=plan, shard="1/2")
    assert {path: path.stat().st_size for path in (tmp_path / "parts").glob("*.jsonl")} == size, "nothing twice"


@pytest.mark.slow
def test_what_is_missing_is_said_by_part_and_made_without_shards_too(lm, tmp_path):
    plan = PLANS["single"]
    bench(lm, cases(), METHODS, tmp_path, plan=plan, shard="1/2")
    found = Results.load(tmp_path)
    tasks = list_tasks(found.manifest["names"], found.manifest["together"], plan)
    missing = sum(len(task.keys(plan)) for task in tasks[1::2])
    total = sum(len(task.keys(plan)) for task in tasks)
    assert found.unfinished == f"Not finished: {missing} of {total} rows are missing, {missing} of part 2 of 2"
    assert f"{found.unfinished}." in str(found)
    whole = bench(lm, cases(), METHODS, tmp_path, plan=plan)
    assert whole.unfinished is None and len(whole.rows) + len(whole.before) == total
    assert len((tmp_path / "cases.jsonl").read_text().splitlines()) < len(whole.rows)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_shard_is_refused(text, lm, tmp_path):
    with pytest.raises(InputError, match="such as 2/4"):
        bench(lm, cases(), [Nothing()], tmp_path, shard=text)


@pytest.mark.slow
def test_who_writes_where(lm, tmp_path):
    """Shards beside each other, and nobody beside a whole run or a shard's own twin."""
    manifest = bench(lm, cases(), [Nothing()], tmp_path).manifest
    about = {key: value for key, value in manifest.items() if key != "settings"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], env=environment, **pipes) as other:

        def refused(shard: str) -> bool:
            assert other.stdin is not None and other.stdout is not None
            other.stdin.write(f"{shard}\n")
            other.stdin.flush()
            return "expected nobody else to write to" in other.stdout.readline()

        with open_run(tmp_path, manifest["settings"], about, Shard(2, 1)):
            assert [refused(shard) for shard in ("2/2", "1/2", "whole", "1/3")] == [False, True, True, False]
        assert not refused("whole")
        with open_run(tmp_path, manifest["settings"], about):
            assert refused("1/2") and refused("whole")
        with write_lock(tmp_path):
            assert refused("1/2") and refused("whole")
        assert not refused("1/2") and other.stdin
        other.stdin.close()


OTHER = """
import sys
from pathlib import Path
from reknow.engine.shards import Shard
from reknow.engine import shards
from reknow.evaluation import run_parts
from reknow.files.manifest import read_manifest
shards.PATIENCE = run_parts.PATIENCE = 0.1
folder = Path(sys.argv[1])
manifest = read_manifest(folder)
about = {key: value for key, value in manifest.items() if key != "settings"}
for line in sys.stdin:
    shard = None if line.strip() == "whole" else Shard.parse(line)
    try:
        with run_parts.open_run(folder, manifest["settings"], about, shard):
            pass
        print("opened", flush=True)
    except Exception as error:
        print(error, flush=True)
"""


@pytest.mark.slow
def test_lines_that_are_no_rows_are_named_set_aside_and_made_again(lm, tmp_path):
    plan, whole = PLANS["single"], tmp_path / "whole"
    first = bench(lm, cases(), METHODS, whole, plan=plan, shard="1/2")
    first = bench(lm, cases(), METHODS, whole, plan=plan, shard="2/2")
    file = whole / "cases.2-of-2.jsonl"
    lines = file.read_bytes().split(b"\n")
    lines[1] = lines[1][:50] + lines[2]  # half a line, and the next behind it
    del lines[2]
    lines[3] = b"\xff\x00"
    file.write_bytes(b"\n".join(lines[:-2]) + b"\n" + lines[-2][:30])
    with pytest.raises(InputError, match=rf"line 2 of {file} has something else .* --repair` sets it aside"):
        bench(lm, cases(), METHODS, whole, plan=plan, shard="1/2")
    with pytest.raises(InputError, match="--repair"):
        Results.load(whole)
    ran = CliRunner().invoke(app, ["report", str(whole), "--repair"])
    assert ran.exit_code == 0, ran.output
    assert [f"{file}: line {n} is no row" in ran.stdout for n in (2, 4, len(lines) - 1)] == [True] * 3
    assert "ends in its midst" in ran.stdout
    assert (whole / "cases.2-of-2.jsonl.bad").read_bytes().count(b"\n") == 3
    assert repair(whole) == []
    left = Results.load(whole)
    assert left.unfinished and "Not finished: 4 of " in left.unfinished and "4 of part 2 of 2" in left.unfinished
    assert left.unfinished in (whole / "report.md").read_text("utf-8")
    again = bench(lm, cases(), METHODS, whole, plan=plan, shard="2/2")
    assert all_rows(again) == all_rows(first)


@pytest.mark.slow
def test_a_texts_that_were_written_together_are_written_together_again(lm, tmp_path):
    """Whatever is left of a block of cases, its texts are those of the whole block, to the last bit."""
    prompt = Probe("Peru lives", (), "fluency", "generation")
    asked = [replace(case, probes=(*case.probes, prompt)) for case in make_cases()]
    plan = Plan(fluency=True)
    whole = bench(lm, asked, METHODS, tmp_path / "whole", plan=plan)
    for kept in (1, 2, 3, 5, 6):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(kept))
        rows = (folder / "cases.jsonl").read_bytes().splitlines(keepends=True)
        (folder / "cases.jsonl").write_bytes(b"".join(random.Random(kept).sample(rows, kept)))
        assert all_rows(bench(lm, asked, METHODS, folder, plan=plan)) == all_rows(whole)


@dataclass(frozen=True)
class Raises(Nothing):
    """An editor with a slip of its own, for one subject."""

    def edit(self, lm, edits):
        if edits[0].subject == "Apple":
            return {}[edits[0].subject]
        return super().edit(lm, edits)


def test_an_unforeseen_error_of_one_edit_is_its_own(lm, tmp_path):
    results = bench(lm, cases(), {"raises": Raises()}, tmp_path)
    (reason,) = results.failed["raises"].values()
    assert reason.startswith("expected an edit, or a refusal; got KeyError: 'Apple' (test_shards.py:")
    assert [row["error"] is None for row in results.rows.values()] == [True, True, False, True]


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left"), RuntimeError("CUDA error: lost")])
def test_what_would_come_again_ends_the_run(error, lm, tmp_path):
    class Lost(Nothing):
        def edit(self, lm, edits):
            raise error

    with pytest.raises(type(error)):
        bench(lm, cases(), {"lost": Lost()}, tmp_path)


def test_the_command_line_of_shards_and_of_failed_edits(tmp_path):
    model, out = saved(tmp_path / "model"), tmp_path / "run"
    edits = tmp_path / "edits.json"
    fact = {"prompt": "The capital of {} is", "subject": "Peru", "target_new": "Paris"}
    edits.write_text(json.dumps([fact, {"prompt": "Apple lives in", "target_new": "Lima"}]), "utf-8")
    line = ["bench", "--model", model, "--data", str(edits), "--out", str(out), "--methods", "rome,ft-m"]
    line += ["--set", "rome.covariance_tokens=0", "--set", "rome.context_groups=[]", "--set", "layer=1"]
    line += ["--set", "steps=2", "--no-generate", "--no-side-effects", "--no-oracle", "--shard"]
    first = CliRunner().invoke(app, [*line, "2/2"])
    assert first.exit_code == 1 and "1 edits failed" in first.stderr, first.output
    assert f"part 2/2 is whole; when all are: reknow report {out}" in first.stdout
    assert "Not finished: 4 of 6 rows are missing, 4 of part 1 of 2." in first.stdout
    assert not (out / "report.html").exists()
    second = CliRunner().invoke(app, [*line, "1/2"])
    assert second.exit_code == 1 and "Not finished" not in second.stdout
    shown = CliRunner().invoke(app, ["report", str(out)])
    assert shown.exit_code == 0 and (out / "report.html").exists()
    refused = CliRunner().invoke(app, [*line, "3/2"])
    assert refused.exit_code == 2 and "expected a shard as I/N" in refused.stderr
    refused = CliRunner().invoke(app, ["study", "tasks", "--shard", "1/2"])
    assert refused.exit_code == 2 and "--shard" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied the Unix way")
def test_a_shard_that_is_killed_at_any_step_goes_on(lm, tmp_path):
    """Dozens of true kills: whatever the disk had seen, the same command makes what is missing, and nothing twice."""
    plan, methods = Plan(generate=False), {"fine": FT(layer=2, steps=1, learning_rate=0.1), "none": Nothing()}
    whole = comparable(all_rows(bench(lm, cases()[:3], methods, tmp_path / "whole", plan=plan)))

    def share(folder):
        return lambda: bench(lm, cases()[:3], methods, folder, plan=plan, shard="1/2")

    steps = run_and_kill(share(tmp_path / "count"))
    points = random.Random(0).sample(range(1, steps + 1), min(steps, 40))
    for number in points:
        folder = tmp_path / f"at{number}"
        assert run_and_kill(share(folder), number) == -signal.SIGKILL
        share(folder)()
        found = bench(lm, cases()[:3], methods, folder, plan=plan, shard="2/2")
        assert comparable(all_rows(found)) == whole, number
        lines = [line for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines()]
        assert len(lines) == len(whole), number
