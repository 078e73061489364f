"""What only a GPU can tell, in one command that ends within its minutes and goes on where it was.

    python benchmarks/gpu.py --out runs/gpu                                    # all parts that fit into ten minutes
    python benchmarks/gpu.py --out runs/gpu --easyedit PATH --minutes 5        # what is missing, EasyEdit beside it
    python benchmarks/gpu.py --out runs/gpu --report                           # the tables of what is there
    python benchmarks/gpu.py --out runs/try --shape tiny --device cpu          # all of it in small, on a CPU

The parts, in order of worth: what the machine can do (`machine`); MEMIT with 1,000 facts on the 7B shape, random
weights in bf16 (`memit-1000`); ROME fact by fact, as it is, as CUDA graphs, and EasyEdit's where `--easyedit` names
its checkout (`rome`); the contract of all methods (`contract`); MEMIT with 10,000 facts, of whose 25 passes as many
are taken as fit (`memit-10000`); and the table of methods on a real model in bf16 (`real`: SmolLM2, or `--model`).

Each part runs in a process of its own, so that none can harm another, and leaves `NAME.json` and `NAME.log` in the
folder. A part for which the predicted seconds are not left is skipped, one that outlasts the minutes is stopped, one
that failed says so in its file and is tried again by the next call, behind those that were not run yet. Facts of
MEMIT beyond the bundled 1,000 are EasyEdit's with `--data counterfact-train.json …`, else the bundled prompts with
one another's subjects.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_report import report

LOADING = 25.0
"""Seconds until a process has its libraries and a model of the 7B shape."""
RATE = 790.0
"""TFLOP/s of a large matrix product in bf16 on an H200, at half of which the predictions reckon."""
PER_FACT, PER_PASS = 0.013, 0.0009
"""Seconds of a fact of MEMIT at half that rate: 5 × 10¹² operations once, 0.35 × 10¹² in every pass; `gpu_plan`."""
FEWEST_PASSES = 3
TINY = 20.0
"""Seconds of any part in small."""


@dataclass(frozen=True)
class Part:
    """One measurement."""

    name: str
    seconds: Callable[[argparse.Namespace], float]
    """What it takes on one H200, or on this GPU once that is measured, as predicted."""


def memit_seconds(options: argparse.Namespace, facts: int, passes: int) -> float:
    per_fact, per_pass = memit_rates(options)
    return LOADING + facts * (per_fact + passes * per_pass)


PARTS = (
    Part("machine", lambda options: 25),
    Part("memit-1000", lambda options: memit_seconds(options, options.facts[0], options.passes)),
    Part("rome", lambda options: LOADING + 50 + 25 * (options.easyedit is not None)),
    Part("contract", lambda options: 120),
    Part("memit-10000", lambda options: memit_seconds(options, options.facts[1], FEWEST_PASSES)),
    Part("real", lambda options: 100),
)


def read(file: Path) -> dict | None:
    """What a part left; None: nothing that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(file: Path, found: dict) -> None:
    """Writes the file aside and renames it: what is there is whole."""
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    aside.replace(file)


def is_done(found: dict | None) -> bool:
    return found is not None and "error" not in found and not found["found"].get("left out")


def pending(options: argparse.Namespace) -> list[Part]:
    """The parts that are asked for and not done: those that failed behind those that were never run."""
    left = {}
    for part in PARTS:
        found = read(options.out / f"{part.name}.json")
        if (not options.parts or part.name in options.parts) and not is_done(found):
            left[part] = found is not None
    return sorted(left, key=left.__getitem__)


def memit_rates(options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a fact of MEMIT once, and in every pass: those of the part with fewer facts if that is there, else
    derived, for a GPU that is slower more, but never less."""
    few = read(options.out / "memit-1000.json")
    if few and is_done(few):
        facts, passes, spent = (few["found"][key] for key in ("facts", "passes", "seconds"))
        return (spent["all"] - spent["search of δ"]) / facts, spent["search of δ"] / facts / passes
    found = read(options.out / "machine.json")
    slower = max(1.0, RATE / found["found"]["TFLOP/s"]["bfloat16"]) if found and is_done(found) else 1.0
    return slower * PER_FACT, slower * PER_PASS


def passes_that_fit(options: argparse.Namespace, seconds: float) -> int:
    """Of MEMIT's passes with the most facts, as many as fit into nine tenths of so many seconds."""
    per_pass = options.facts[1] * memit_rates(options)[1]
    rest = (0.9 * seconds - memit_seconds(options, options.facts[1], 0)) / per_pass
    return max(FEWEST_PASSES, min(options.passes, int(rest)))


def run_all(options: argparse.Namespace, started: float) -> None:
    """Runs what is missing, as far as it fits."""
    options.out.mkdir(parents=True, exist_ok=True)
    for part in pending(options):
        left = 60 * options.minutes - (time.monotonic() - started)
        passes, predicted = options.passes, part.seconds(options)
        if options.shape == "tiny":
            predicted = TINY
        elif part.name == "memit-10000" and predicted <= left:
            passes = passes_that_fit(options, left)
            predicted = memit_seconds(options, options.facts[1], passes)
        if predicted > left:
            need = f"about {predicted:.0f} s are needed and {left:.0f} s are left"
            print(f"{part.name}: skipped, as {need}: run it again")
            continue
        print(f"{part.name}: about {predicted:.0f} s of {left:.0f} s", flush=True)
        run_part(options, part.name, left, passes, predicted)


def run_part(options: argparse.Namespace, name: str, left: float, passes: int, predicted: float) -> None:
    """Runs one part in a process of its own, which is stopped when the time is up."""
    file, log = options.out / f"{name}.json", options.out / f"{name}.log"
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", name]
    command += ["--seconds", f"{left:.0f}", "--passes", str(passes)]
    started = time.monotonic()
    failed = None
    with log.open("w", encoding="utf-8") as text:
        # A group of its own, so that tests which the part runs are stopped with it.
        child = subprocess.Popen(command, stdout=text, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            if code := child.wait(timeout=left):
                failed = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            failed = f"it was stopped after {left:.0f} s"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    seconds = time.monotonic() - started
    found = None if failed else read(file)
    if found is None:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        found = {"error": failed or "it left no result", "log": tail}
    keep(file, {**found, "predicted": predicted, "seconds": seconds, "command": " ".join(sys.argv[1:])})
    print(f"{name}: {found.get('error', 'done')}, {seconds:.0f} s", flush=True)


def run_child(options: argparse.Namespace) -> None:
    """One part, in this process; whatever it runs into is what it found."""
    import torch

    import gpu_parts
    from speed import machine

    torch.set_num_threads(min(8, os.cpu_count() or 1) if options.device != "cpu" else 1)
    about: dict = {"date": time.strftime("%Y-%m-%d")}
    try:
        setting = gpu_parts.Setting(
            device=options.device,
            shape=options.shape,
            out=options.out,
            seconds=options.seconds,
            easyedit=options.easyedit,
            model=options.model,
            layer=options.layer,
            known=options.known,
            data=tuple(options.data),
            tests=options.tests,
        )
        runs = {
            "machine": lambda: gpu_parts.machine(setting),
            "memit-1000": lambda: gpu_parts.memit(setting, options.facts[0], options.passes),
            "rome": lambda: gpu_parts.rome(setting),
            "contract": lambda: gpu_parts.contract(setting),
            "memit-10000": lambda: gpu_parts.memit(setting, options.facts[1], options.passes),
            "real": lambda: gpu_parts.real(setting),
        }
        found = {"found": runs[options.child]()}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {error}", "log": traceback.format_exc()[-3000:]}
    keep(options.out / f"{options.child}.json", {**found, "about": about | machine()})


def refuse_missing_device(parser: argparse.ArgumentParser, device: str) -> None:
    from torch import cuda

    if device.startswith("cuda") and not cuda.is_available():
        parser.error("expected a GPU; got none: run it where torch.cuda.is_available(), or --shape tiny --device cpu")


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=10, help="all parts together; see above")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="these alone")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=["7B", "tiny"], default="7B")
    parser.add_argument("--easyedit", type=Path, help="the folder of a checkout of EasyEdit")
    parser.add_argument("--model", default="demo:smollm2", help="the real model: a name or a folder")
    parser.add_argument(
        "--layer", type=int, default=3, help="where the real model is edited; -1: where it is suggested"
    )
    parser.add_argument("--known", type=int, default=20, help="how many facts that the real model knows, of each set")
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="EasyEdit's counterfact-*.json, for more facts"
    )
    parser.add_argument("--facts", type=int, nargs=2, default=[1000, 10_000], help="of the two parts of MEMIT")
    parser.add_argument("--passes", type=int, default=25, help="of MEMIT, at most")
    parser.add_argument("--tests", default="", help="some of the contract's tests, as pytest's -k has it")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.layer = None if options.layer is not None and options.layer < 0 else options.layer
    if options.child:
        run_child(options)
        return
    if options.easyedit is not None and not (options.easyedit / "easyeditor").is_dir():
        parser.error(f"expected a checkout of EasyEdit at {options.easyedit}; there is none: give its folder")
    if not options.report:
        refuse_missing_device(parser, options.device)
        run_all(options, started)
    print(report(options.out, [part.name for part in PARTS]))


if __name__ == "__main__":
    main()
