"""What `gpu.py` measures, part by part; each gives what JSON holds."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from easyedit import EasyEdit
from gpu_graphs import captured_passes
from gpu_plan import memit_work
from real_models import SETS, Study
from reknow import LM, MEMIT, METHODS, ROME, Edit, load_cases, method
from reknow.editing.covariance import statistics
from reknow.editing.papers_layers import band_around
from reknow.edits import Case
from speed import ALL_PASSES, COVARIANCE_TOKENS, EXACT, plain, random_llama
from speed_work import by_phase, matmul_rate, now, timed

SHAPES: dict[str, dict[str, Any]] = {
    "7B": {},
    "tiny": dict(hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4),
}
"""What a LlamaConfig is given: its defaults are Llama's 7B."""
LAYER = {"7B": 5, "tiny": 1}
PASSES = 25
"""MEMIT's passes for each fact, as in the paper: with random weights nothing is found before."""
FACTS = 5
"""Facts of the part `rome`."""
GRAPHS = "reknow, CUDA graphs"
TABLE = ("rome", "memit", "ft-m", "grace", "r-rome", "emmet", "alphaedit", "pmet", "ft-l", "ice", "ft-t", "lora")
"""Methods of the real model's table, in the order in which they are run."""


@dataclass(frozen=True)
class Setting:
    """What was asked for on the command line."""

    device: str
    shape: str
    out: Path
    seconds: float
    """What the part may take."""
    easyedit: Path | None = None
    model: str = "demo:smollm2"
    layer: int | None = None
    """Where the real model is edited; None: at the layer that is suggested for it."""
    known: int = 20
    """How many facts that it knows of each set."""
    data: tuple[Path, ...] = ()
    facts: tuple[int, int] = (1000, 10_000)
    """Of the two parts of MEMIT."""
    passes: int = PASSES
    tests: str = ""
    """Which of the contract's tests, as pytest's -k has it; empty: all."""


def random_model(setting: Setting) -> LM:
    return random_llama(setting.device, **SHAPES[setting.shape])


def many_facts(count: int, data: Sequence[Path] = ()) -> list[Edit]:
    """Different requests: those of EasyEdit's files of CounterFact, then the bundled ones, and, where they are not
    enough, each prompt of these with the subjects of others too. What is random knows none of them anyway."""
    cases = [case for file in data for case in load_cases("counterfact-easyedit", path=file)]
    bundled = [case.edit for case in load_cases("counterfact")]
    found: dict[str, Edit] = {}
    for edit in [*(case.edit for case in cases), *bundled]:
        found.setdefault(edit.text, edit)  # a request with two answers would be refused
    for turn in range(1, len(bundled)):
        if len(found) >= count:
            break
        for i, edit in enumerate(bundled):
            other = replace(edit, subject=bundled[(i + turn) % len(bundled)].subject, id=f"{edit.id}+{turn}")
            found.setdefault(other.text, other)
    return list(found.values())[:count]


@contextmanager
def peak(found: dict, device: str) -> Iterator[None]:
    """Notes the most memory that was taken while it is open, GiB; nothing on a CPU."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    if cuda:
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        found["GiB reserved"] = torch.cuda.max_memory_reserved() / 2**30


def machine(setting: Setting) -> dict:
    """What the machine can do: large matrix products, copies, and how long it takes to tell it something."""
    here, size = torch.device(setting.device), 8192 if setting.shape == "7B" else 256
    found: dict[str, Any] = {"TFLOP/s": {}}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        rate = matmul_rate(torch.empty(1, dtype=dtype, device=here), size=size)
        found["TFLOP/s"][str(dtype).removeprefix("torch.")] = rate / 1e12
    source = torch.randn(4 * size**2, device=here)
    target = torch.empty_like(source)
    target.copy_(source)
    repeats = 10
    copying = timed(lambda: [target.copy_(source) for _ in range(repeats)])[1]
    found["GB/s, read and written"] = 2 * repeats * source.nbytes / copying / 1e9
    one = torch.ones(1, device=here)
    one.add_(1)
    found["µs per small kernel"] = timed(lambda: [one.add_(1) for _ in range(2000)])[1] / 2000 * 1e6
    if here.type == "cuda":
        found["GiB"] = torch.cuda.get_device_properties(here).total_memory / 2**30
    return found


def memit(setting: Setting, count: int, passes: int) -> dict:
    """MEMIT on many facts at once: seconds and operations by phase, derived and measured, and memory."""
    lm, edits = random_model(setting), many_facts(count, setting.data)
    layers = band_around(lm, LAYER[setting.shape])
    method = MEMIT(layers=tuple(layers), covariance_tokens=COVARIANCE_TOKENS, steps=passes, **ALL_PASSES)
    found: dict[str, Any] = {"facts": len(edits), "passes": passes, "layers": layers}
    found["prepared"] = prepare(lm, method, layers)
    derived, seconds = timed(lambda: memit_work(lm, edits, method, layers))
    found |= {"derived": derived, "derived in": seconds}
    print(f"derived for {len(edits)} facts: {derived}", flush=True)
    replace(method, steps=2).edit(lm, edits[:2])
    with peak(found, setting.device):
        found["seconds"] = by_phase(lambda: method.edit(lm, edits), now)
    # A pass more is so much search more: what all passes would take.
    whole, search = found["seconds"]["all"], found["seconds"]["search of δ"]
    found[f"seconds at {PASSES} passes"] = whole + search * (PASSES / passes - 1)
    return found


def prepare(lm: LM, method: MEMIT | ROME, layers: Sequence[int]) -> dict[str, float]:
    """Seconds of what is done once per model: contexts, covariances, and their factors."""
    seconds = {}
    _, seconds["contexts"] = timed(lambda: method.contexts(lm))
    _, seconds["fingerprint"] = timed(lambda: lm.fingerprint)
    _, seconds["covariances"] = timed(lambda: statistics(lm, layers, tokens=method.covariance_tokens))
    _, seconds["factors"] = timed(lambda: [method.whitening(lm, layer) for layer in layers])
    return seconds


def rome(setting: Setting) -> dict:
    """ROME fact by fact with all contexts in each of 20 passes: as it is, as CUDA graphs, and EasyEdit's."""
    lm, layer = random_model(setting), LAYER[setting.shape]
    ours = ROME(layer=layer, steps=20, covariance_tokens=COVARIANCE_TOKENS, **EXACT)
    found: dict[str, Any] = {"layer": layer, "prepared": prepare(lm, ours, [layer]), "ways": {}, "errors": {}}
    cases = {case.edit: case for case in load_cases("counterfact", limit=FACTS + 1)}
    edits = list(cases)
    split = replace(ours, context_batches=ROME.context_batches)
    losses: dict[str, list[list[float]]] = {}

    def measure(label: str, way: Callable[[Edit], tuple[list[float], float]], edit: Edit) -> None:
        if label in found["errors"]:
            return
        try:
            descent, seconds = way(edit)
        except (Exception, SystemExit) as error:  # whatever a way runs into, the others are measured
            found["errors"][label] = f"{type(error).__name__}: {error}"
            return
        losses.setdefault(label, []).append(descent)
        found["ways"].setdefault(label, []).append(seconds)

    ways = {
        "reknow": lambda edit: one_edit(lm, ours, edit),
        f"reknow, {ROME.context_batches} context batches": lambda edit: one_edit(lm, split, edit),
    }
    if setting.easyedit is not None:
        ways["EasyEdit"] = easyedits_rome(setting.easyedit, lm, ours, layer, cases)
    for edit in edits:  # the first one warms up
        for label, way in ways.items():
            measure(label, way, edit)
    found["phases"] = by_phase(lambda: ours.edit(lm, edits[-1:]), now)
    with peak(found, setting.device):
        ours.edit(lm, edits[-1:])
    captures: list[float] = []
    if torch.device(setting.device).type == "cuda":  # last, as a recording that fails may leave the device unusable
        for edit in edits:
            measure(GRAPHS, lambda edit: one_edit(lm, ours, edit, captures), edit)
    for label in list(found["ways"]):
        if not found["ways"][label][1:]:
            found["errors"].setdefault(label, "it was not measured")
        found["ways"][label] = found["ways"][label][1:]
    found["captures"] = captures[1:]
    pairs = zip(losses.get("reknow", []), losses.get(GRAPHS, []), strict=False)
    apart = [abs(a - b) / abs(a) for one, two in pairs for a, b in zip(one, two, strict=False)]
    found["largest difference of a loss"] = max(apart, default=None)
    return found


def easyedits_rome(path: Path, lm: LM, ours: ROME, layer: int, cases: dict[Edit, Case]):
    """EasyEdit's ROME of an edit with our settings as the plain numbers that it takes; loaded when it is first
    called."""
    theirs: list[EasyEdit] = []

    def edit_one(edit: Edit) -> tuple[list[float], float]:
        if not theirs:
            theirs.append(EasyEdit(path, lm))
        prefixes, numbers = ours.contexts(lm), plain(lm, cases[edit], layer, "value")
        settings = {"v_num_grad_steps": ours.steps, "clamp_norm_factor": ours.clamp, **numbers}
        return [], theirs[0].rome(edit, layer, prefixes, COVARIANCE_TOKENS, **settings).seconds

    return edit_one


def one_edit(lm: LM, method: ROME, edit: Edit, captures: list[float] | None = None) -> tuple[list[float], float]:
    """(loss of every pass, seconds); as CUDA graphs where a list is given, for the seconds of recording them."""
    with nullcontext() if captures is None else captured_passes() as took:
        patch, seconds = timed(lambda: method.edit(lm, [edit]))
    if captures is not None and took is not None:
        captures += took
    return patch.notes["losses"], seconds


def contract(setting: Setting) -> dict:
    """The tests of what every method promises, on the device."""
    folder, report = Path(__file__).parents[1], setting.out / "contract.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "contract",
        "tests/methods/test_contract.py",
        f"--junitxml={report.resolve()}",
    ]
    if setting.tests:
        command += ["-k", setting.tests]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    started = time.perf_counter()
    environment = os.environ | {"REKNOW_TEST_DEVICE": setting.device}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=max(1.0, setting.seconds - 10)
    )
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "said": done.stdout[-2000:]}
    if not report.exists():
        raise RuntimeError(f"pytest left no report: {done.stderr[-2000:] or done.stdout[-2000:]}")
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    found |= {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    broken = [case for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    found["broken"] = {str(case.get("name")): _first_line(case) for case in broken}
    return found


def _first_line(case: ElementTree.Element) -> str:
    return next((part.get("message") or "" for part in case if part.tag in ("failure", "error")), "")[:500]


def real(setting: Setting) -> dict:
    """The table of methods on a real model in bf16; rows that are kept in the folder are not made again."""
    started, (first, last) = time.perf_counter(), (1, setting.known)
    study = Study(setting.out / "real")
    study.open(setting.model, SETS.split(","), dtype="bfloat16", device=setting.device)
    study.name += ", bf16"
    cases = {name: study.read_before(name, first, last) for name in study.sets}
    found: dict[str, Any] = {"left out": {}, "errors": {}, "wall seconds": {}}
    if setting.layer is not None:
        study.lm.memo[("layer",)] = setting.layer
    for name in [name for name in TABLE if name in METHODS]:
        if time.perf_counter() - started > setting.seconds - 30:
            found["left out"][name] = "there was no time left"
            continue
        before = now()
        try:
            for dataset, own in cases.items():
                study.run(name, method(name), dataset, own, first, setting.layer)
        except Exception as error:  # a method that fails does not cost the others their row
            found["errors"][name] = f"{type(error).__name__}: {error}"
        found["wall seconds"][name] = now() - before
        print(name, found["wall seconds"][name], flush=True)
    return {**found, "table": study.table(first, last, TABLE)}
