"""Workers that die at any moment: nothing is lost, nothing is made twice, and what cannot go on says so."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from conftest import make_lm
from kills import run as run_and_kill
from reknow import FT
from reknow.engine.handing_out import Died, Done, Kept, Made, Ready, hand_out
from reknow.engine.jobs import Local
from reknow.engine.worker import Worker
from reknow.errors import EditRefused, EngineError, InputError, MissingExtra
from reknow.evaluation import Plan, bench
from reknow.evaluation.runner import bench_on
from runs import PLANS, all_rows, make_cases

METHODS = {"fine": FT(layer=2, steps=3, learning_rate=0.17), "other": FT(layer=1, steps=2, learning_rate=0.1)}


pytestmark = pytest.mark.usefixtures("short_texts")


class Faulty:
    """Workers in this process, one step at a time in random order; some end before they give what they have made.

    Args:
        starts: opens the worker of a number.
        ends: numbers of the steps, over all workers, at which one ends.
        whole: a worker does a task in one go, and what it made comes bit by bit: in one thread operations on models
            must end in the order in which they began.
    """

    def __init__(self, starts, count: int, seed: int, ends=(), whole: bool = False):
        self.whole = whole
        self.starts, self.draw, self.ends, self.step = starts, random.Random(seed), {*ends}, 0
        self.coming: dict[int, Any] = {worker: self._begin(worker) for worker in range(count)}
        self.given = Counter()

    def _begin(self, worker: int):
        self.workers = getattr(self, "workers", {})
        self.workers[worker] = self.starts()
        yield Ready(worker)

    def wait(self):
        worker = self.draw.choice([w for w, steps in self.coming.items() if steps is not None])
        self.step += 1
        event = next(self.coming[worker], None)
        if event is None:
            self.coming[worker] = None
            return Done(worker)
        if self.step in self.ends:
            self.coming[worker].close()
            self.coming[worker] = None
            return Died(worker, "killed")
        if isinstance(event, Ready):
            self.coming[worker] = None
        return event

    def give(self, worker, task, there, files):
        self.given[task] += 1

        def steps():
            made = self.workers[worker].do(task, there, files)
            for word, said in [*made] if self.whole else made:
                if word == "row":
                    yield Made(worker, said)
                elif word == "file":
                    yield Kept(worker, *said)

        self.coming[worker] = steps()

    def restart(self, worker):
        self.coming[worker] = self._begin(worker)


@dataclass(frozen=True)
class Count:
    """A task of so many rows."""

    name: str
    rows: int
    place: str = ""


class Counting:
    """A job whose tasks count."""

    def begin(self, lm, folder):
        return self

    def keys(self, task):
        return [(task.name, number) for number in range(task.rows)]

    def do(self, task, there):
        for key in self.keys(task):
            if key not in there:
                yield {"key": key}


class Keys(list):
    """The keys of the rows that were kept."""

    def keep(self, row):
        self.append(row["key"])


def opened(job):
    def start():
        worker = Worker(make_lm, 1)
        worker._doer = job.begin(None, worker._folder)
        return worker

    return start


TASKS = [Count("abcdefgh"[number], number % 4) for number in range(8)]
WANTED = sorted(key for task in TASKS for key in Counting().keys(task))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_death_at_any_step_loses_nothing_and_makes_nothing_twice(workers, caplog):
    """At each of some hundred and fifty steps, and at several of them in one work."""
    caplog.set_level(logging.CRITICAL)
    for seed in range(4):
        crew = Faulty(opened(Counting()), workers, seed)
        kept = Keys()
        hand_out(crew, Counting(), TASKS, kept, kept.keep, None)
        assert sorted(kept) == WANTED
        draw = random.Random(seed)
        for ends in [(step,) for step in range(1, crew.step + 1)] + [draw.sample(range(1, 30), 2) for _ in range(9)]:
            kept = Keys()
            faulty = Faulty(opened(Counting()), workers, seed, ends)
            hand_out(faulty, Counting(), TASKS, kept, kept.keep, None)
            assert sorted(kept) == WANTED, (workers, seed, ends)


def test_a_task_whose_worker_always_ends_ends_the_work(caplog):
    class Deadly(Counting):
        def do(self, task, there):
            yield from super().do(task, there)
            if task.name == "d":
                raise GeneratorExit

    class Crew(Faulty):
        def wait(self):
            try:
                return super().wait()
            except GeneratorExit:
                worker = next(w for w, steps in self.coming.items() if steps is not None and not steps.gi_frame)
                self.coming[worker] = None
                return Died(worker, "out of memory")

    kept = Keys()
    with pytest.raises(EngineError, match=r"3 in a row ended over the task Count.*out of memory: give them more"):
        hand_out(Crew(opened(Deadly()), 2, 0), Deadly(), TASKS, kept, kept.keep, None)
    assert ("d", 2) in kept and len(kept) == len(set(kept))
    assert "a worker ended over the task" in caplog.text
    with pytest.raises(EngineError, match="3 in a row ended while it had no task"):
        hand_out(Faulty(opened(Counting()), 1, 0, range(9)), Counting(), TASKS, kept, print, None)


class FaultyEngine(Local):
    """Workers that end at some steps, each with a model of its own."""

    def __init__(self, lm, seed: int, ends=()):
        super().__init__(lm)
        self.seed, self.ends = seed, ends

    def perform(self, job, tasks, there, keep, folder):
        def start():
            worker = Worker(make_lm, 1)
            worker.begin(job)
            return worker

        self.crew = Faulty(start, 3, self.seed, self.ends, whole=True)
        hand_out(self.crew, job, tasks, there, keep, folder)


LONG = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("single", "sequential")]


@pytest.mark.parametrize("mode", ["batch", *LONG])
def test_a_comparison_with_workers_that_end_has_the_rows_of_one_process(mode, tmp_path, monkeypatch, caplog):
    """Sequences go on from the patches that the dead worker gave."""
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(FT, "edits_per_call", 2)
    plan = PLANS[mode]
    whole = all_rows(bench(make_lm(), make_cases(), METHODS, tmp_path / "whole", plan=plan))
    draw = random.Random(1)
    for seed in range(3):
        folder = tmp_path / str(seed)
        engine = FaultyEngine(make_lm(), seed, draw.sample(range(4, 20), seed * 2))
        found = bench_on(engine, make_cases(), METHODS, folder, plan=plan)
        assert all_rows(found) == whole and found.unfinished is None
        lines = [line for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines()]
        assert len(lines) == len(whole)
        assert sorted(path.name for path in (folder / "patches").rglob("*.patch")) == sorted(
            path.name for path in (tmp_path / "whole/patches").rglob("*.patch")
        )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied the Unix way")
@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_a_driver_that_is_killed_at_any_step_goes_on(mode, tmp_path, caplog):
    """Dozens of true kills of the process that writes: whatever the disk had seen, nothing is lost or made twice."""
    caplog.set_level(logging.CRITICAL)
    plan = Plan(mode, generate=False)
    lm, methods = make_lm(), {"fine": METHODS["other"]}
    whole = all_rows(bench(lm, make_cases(3), methods, tmp_path / "whole", plan=plan))

    def drive(folder):
        return lambda: bench_on(FaultyEngine(lm, 0, [7]), make_cases(3), methods, folder, plan=plan)

    steps = run_and_kill(drive(tmp_path / "count"))
    for number in random.Random(0).sample(range(1, steps + 1), min(steps, 25)):
        folder = tmp_path / f"at{number}"
        assert run_and_kill(drive(folder), number) == -signal.SIGKILL
        found = bench(lm, make_cases(3), methods, folder, plan=plan)
        assert all_rows(found) == whole, number
        lines = [line for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines()]
        assert len(lines) == len(whole), number


def test_an_error_of_the_disk_ends_the_work_and_what_a_task_had_opened():
    """Rows that cannot be kept stop the run at once; the model is as before."""
    lm, made = make_lm(), []

    def keep(row):
        made.append(row)
        raise InputError("expected room on the disk; got none: make some")

    class Job(Counting):
        def begin(self, lm, folder):
            self.lm = lm
            return self

        def do(self, task, there):
            with self.lm.stacked([]):
                yield from super().do(task, there)
                made.append("too far")

    with pytest.raises(InputError, match="room on the disk"):
        Local(lm).perform(Job(), [Count("a", 2)], [], keep, None)
    assert made == [{"key": ("a", 0)}] and lm.patches == ()


@pytest.mark.parametrize(
    "error", [InputError("a: b"), EditRefused("no", make_cases(1)[0].edit), MissingExtra("ray", "ray", "it")]
)
def test_errors_come_from_other_processes_as_they_are(error):
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error) and vars(found) == vars(error)
