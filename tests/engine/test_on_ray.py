"""Ray: a cluster of four nodes on this machine, of which workers, nodes and the driver are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import saved
from reknow import FT, GRACE, LM
from reknow.cli import app
from reknow.datasets.facts import load_facts
from reknow.engine.jobs import Local
from reknow.engine.on_ray import RayEngine
from reknow.errors import EngineError, InputError
from reknow.evaluation import bench
from reknow.evaluation.runner import bench_on
from reknow.tracing.causal import Tracing
from reknow.tracing.many import TraceJob, TraceTask
from runs import PLANS, all_rows, make_cases

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow]

METHODS = {"fine": FT(layer=2, steps=6, learning_rate=0.17), "other": FT(layer=1, steps=3, learning_rate=0.1)}
NODES, STORE = 4, 80 * 2**20
FACTS = [
    {"prompt": "The capital of {} is", "subject": subject, "target_new": new, "target_true": true}
    for subject, new, true in [("Peru", "Paris", "Lima"), ("France", "Apple", "Paris"), ("Zoë", "Lima", "Peru")] * 30
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster():
    """Four nodes of one core each, by themselves; this process belongs to none yet."""
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE}
    made = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    for _ in range(NODES - 1):
        made.add_node(**options)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def engine(cluster, model):
    with RayEngine(partial(LM, model), address=cluster.address) as made:
        yield made


class Disturbed:
    """The engine, which suffers something after each of so many rows."""

    def __init__(self, engine: RayEngine, faults: dict):
        self.engine, self.faults, self.count = engine, faults, 0

    def ask(self, question):
        return self.engine.ask(question)

    def perform(self, job, tasks, there, keep, folder):
        def disturbed(row):
            keep(row)
            self.count += 1
            if self.count in self.faults:
                self.faults[self.count]()

        self.engine.perform(job, tasks, there, disturbed, folder)


def lines_of(folder: Path) -> list[bytes]:
    return [line for path in folder.glob("*.jsonl") for line in path.read_bytes().splitlines()]


def check(folder: Path, results, whole) -> None:
    """All rows are there, none twice, and they are those of one process."""
    assert all_rows(results) == all_rows(whole) and results.unfinished is None
    assert len(lines_of(folder)) == len(all_rows(whole))


def place_of_a_worker_at_work(engine: RayEngine) -> tuple[int, str]:
    """Process and node of a worker that has a task."""
    workers = engine._workers
    assert workers is not None
    for worker in workers._streams.values():
        actor = ray._private.state.actors(workers._actors[worker]._actor_id.hex())
        if Path(f"/proc/{actor['Pid']}").exists():  # else it has just been killed
            return actor["Pid"], actor["Address"]["NodeID"]
    raise AssertionError("nobody has a task")


@pytest.mark.parametrize("mode", PLANS)
def test_rows_of_four_nodes_are_those_of_one_process(mode, engine, model, tmp_path):
    whole = bench(LM(model), make_cases(), METHODS, tmp_path / "whole", plan=PLANS[mode])
    found = bench_on(engine, make_cases(), METHODS, tmp_path / "run", plan=PLANS[mode])
    assert engine._workers is not None and len(engine._workers._actors) == NODES
    check(tmp_path / "run", found, whole)
    patches = [{p.name for p in (tmp_path / run / "patches").rglob("*.patch")} for run in ("whole", "run")]
    assert patches[0] == patches[1] and bool(patches[0]) == (mode != "single")
    again = bench_on(engine, make_cases(), METHODS, tmp_path / "run", plan=PLANS[mode])
    check(tmp_path / "run", again, whole)


def test_traces_of_four_nodes_are_those_of_one_process(engine, model):
    lm, facts = LM(model), load_facts("known_1000", limit=12)
    known = [replace(fact, prompt="The capital of {} is") for fact in facts]
    job = TraceJob(0.02, Tracing(samples=2, kinds=("hidden",)))
    tasks, found = [TraceTask(fact) for fact in known], {}
    engine.perform(job, tasks, found, lambda row: found.setdefault((row["prompt"],), row), None)
    wanted = {}
    Local(lm).perform(job, tasks, wanted, lambda row: wanted.setdefault((row["prompt"],), row), None)
    assert len(wanted) == 12
    assert {key: str(row) for key, row in found.items()} == {key: str(row) for key, row in wanted.items()}


def test_workers_and_a_node_are_killed_in_the_midst(engine, cluster, model, tmp_path, caplog):
    plan = replace(PLANS["single"], seeds=(0, 1, 2))
    methods = {"grace": GRACE(layer=1, steps=3), **METHODS}  # GRACE makes one edit at a time
    whole = bench(LM(model), make_cases(), methods, tmp_path / "whole", plan=plan)
    killed = []

    def kill_worker():
        killed.append(place_of_a_worker_at_work(engine)[0])
        os.kill(killed[-1], signal.SIGKILL)

    def kill_node():
        others = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
        at = place_of_a_worker_at_work(engine)[1]
        killed.append(next((node for node in others if node.node_id == at), others[0]))
        cluster.remove_node(killed[-1], allow_graceful=False)

    disturbed = Disturbed(engine, {2: kill_worker, 9: kill_node, 15: kill_worker, 21: kill_worker})
    found = bench_on(disturbed, make_cases(), methods, tmp_path / "run", plan=plan)
    assert len(killed) == 4 and "another one takes its place" in caplog.text
    check(tmp_path / "run", found, whole)
    cluster.add_node(num_cpus=1, object_store_memory=STORE)


def test_what_a_worker_raises_comes_as_it_is_and_a_deadly_question_ends(engine, model):
    def refuse(lm):
        raise InputError(f"expected another model; got {lm.layers} layers: choose")

    with pytest.raises(InputError, match="expected another model; got 3 layers: choose"):
        engine.ask(refuse)
    with pytest.raises(EngineError, match="3 in a row ended"):
        engine.ask(lambda lm: os.kill(os.getpid(), signal.SIGKILL))
    assert engine.ask(lambda lm: lm.layers) == 3


def bench_line(model: str, tmp_path: Path, *more: str) -> list[str]:
    data = tmp_path / "facts.json"
    data.write_text(json.dumps([{**fact, "id": str(i)} for i, fact in enumerate(FACTS)]), "utf-8")
    line = ["bench", "--model", model, "--data", str(data), "--limit", "90", "--methods", "grace", "--seeds", "0"]
    return [*line, "--set", "layer=1", "--set", "steps=3", "--no-side-effects", "--no-oracle", "--no-generate", *more]


def started(line: list[str], log: Path) -> subprocess.Popen:
    """The program in a process of its own, with a group of its own, as a shell makes it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # else a background job's
    code += "from reknow.__main__ import main; main()"
    pipes = {"stdout": log.open("w"), "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, "-c", code, *line], env=environment, start_new_session=True, **pipes)


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 100
    while not folder.exists() or len(lines_of(folder)) < count:
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def comparable_lines(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in lines_of(folder)]
    return sorted(
        json.dumps({k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")}) for row in rows
    )


def test_a_driver_that_is_killed_goes_on(cluster, engine, model, tmp_path):
    """SIGKILL of the program that drives the cluster; its workers end, and the same command goes on."""
    out, log = tmp_path / "run", tmp_path / "log"
    engine.close()
    line = bench_line(model, tmp_path, "--out", str(out), "--ray", cluster.address)
    process = started(line, log)
    wait_for_rows(out, 110, process, log)
    process.kill()
    process.wait()
    assert len(lines_of(out)) < 180
    final = started(line, log)
    assert final.wait(100) == 0, log.read_text()
    text = log.read_text()
    assert "(raylet)" not in text and "INFO" not in text and "Not finished" not in text
    assert CliRunner().invoke(app, bench_line(model, tmp_path, "--out", str(tmp_path / "whole"))).exit_code == 0
    assert comparable_lines(out) == comparable_lines(tmp_path / "whole")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_ends_the_workers_and_leaves_a_whole_folder(name, model, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process = started(bench_line(model, tmp_path, "--out", str(out), "--workers", "2"), log)
    wait_for_rows(out, 95, process, log)
    left = children(process.pid)
    assert len(left) > 3
    os.killpg(process.pid, getattr(signal, name)) if name == "SIGINT" else process.terminate()
    assert process.wait(30) == {"SIGINT": 130, "SIGTERM": 143}[name], log.read_text()
    assert "stopped: " in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in left if Path(f"/proc/{pid}").exists()]
    assert all(json.loads(line) for line in lines_of(out))
    assert not [path.name for path in tmp_path.glob(".*.lock")]


def children(pid: int) -> list[int]:
    """All processes below one."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found + [below for child in found for below in children(child)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--ray", "127.0.0.1:1"], "expected a Ray cluster at 127.0.0.1:1 that this machine belongs to; got "),
        (["--ray", "nowhere"], "expected the address of a cluster's head as HOST:PORT, or auto; got 'nowhere'"),
        (["--ray", "ray://head:10001"], "expected the address of a cluster's head as HOST:PORT"),
        (["--workers", "2", "--shard", "1/2"], "expected --workers or --ray alone; got --shard"),
        (["--threads", "2"], "expected one process alone; got --threads"),
        (["--workers", "0"], "expected '--workers' to be greater than or equal to 1"),
    ],
)
def test_an_address_that_is_none_and_options_that_exclude_each_other(given, said, model, tmp_path):
    began = time.monotonic()
    result = CliRunner().invoke(app, bench_line(model, tmp_path, *given, "--out", str(tmp_path / "run")))
    assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, result.output
    assert time.monotonic() - began < 20


def test_without_ray_one_sentence_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, bench_line(model, tmp_path, "--workers", "2", "--out", str(tmp_path / "run")))
    assert result.exit_code == 2 and "pip install 'reknow[ray]'" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
