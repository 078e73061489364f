"""The tables of what `gpu.py` has measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from speed_report import table


def report(folder: Path, names: Sequence[str]) -> str:
    """Every part with the command that made it and the machine; what is missing, and why."""
    return "\n\n".join("\n".join([f"### {name}", "", *_part(folder / f"{name}.json", name)]) for name in names)


def _part(file: Path, name: str) -> list[str]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["Not measured yet."]
    if "error" in kept:
        return [f"Failed: {kept['error']}"]
    about = kept["about"]
    machine = ", ".join(f"{key} {value}" for key, value in about.items() if key != "date")
    lines = [f"    python benchmarks/gpu.py {kept['command']}", "", f"{about['date']}; {machine}."]
    lines += [f"{kept['seconds']:.0f} s in all, {kept['predicted']:.0f} s predicted.", ""]
    return lines + TABLES[name](kept["found"])


def _machine(found: Mapping) -> list[str]:
    rows = [[f"matrix products, {dtype}", f"{rate:.1f} TFLOP/s"] for dtype, rate in found["TFLOP/s"].items()]
    rows += [[key, f"{value:.1f}"] for key, value in found.items() if isinstance(value, float)]
    return table(["", ""], rows)


def _memit(found: Mapping) -> list[str]:
    derived, rows = found["derived"], []
    for phase, seconds in found["seconds"].items():
        work = derived["flops"].get(phase)
        cells = ["–", "–"] if not work else [f"{work / 1e15:.3f}", f"{work / seconds / 1e12:.0f}"]
        rows.append([phase, *cells, f"{seconds:.1f}"])
    search, facts, passes = found["seconds"]["search of δ"], found["facts"], derived["passes"]
    lines = [
        f"MEMIT in layers {found['layers']}, {facts:,} facts in one call, {found['passes']} passes each, in "
        f"{derived['groups']} groups; {derived['tokens']:,} padded tokens. A pass of a group: "
        f"{1000 * search / passes:.0f} ms, over {derived['chains'] / passes:.1f} chains of blocks. "
        f"Once before: {', '.join(f'{key} {value:.1f} s' for key, value in found['prepared'].items())}.",
        "",
        *table(["phase", "derived PFLOP", "TFLOP/s", "seconds"], rows),
        "",
        f"Peak of the memory: {derived['bytes'] / 2**30:.0f} GiB derived, "
        + (
            f"{found['GiB']:.0f} GiB taken, {found['GiB reserved']:.0f} GiB reserved."
            if "GiB" in found
            else "not measured."
        ),
    ]
    whole = {key: value for key, value in found.items() if key.startswith("seconds at ")}
    for key, value in whole.items():
        measured = f"{key.removeprefix('seconds at ')}" == f"{found['passes']} passes"
        lines.append(
            f"All of it {key[8:]}: {value:.0f} s, {1000 * value / facts:.1f} ms per fact"
            + ("." if measured else ", extrapolated from the passes taken.")
        )
    return lines


def _rome(found: Mapping) -> list[str]:
    ways = {label: fmean(seconds) for label, seconds in found["ways"].items() if seconds}
    theirs = ways.get("EasyEdit")
    rows = [
        [label, f"{seconds:.3f}", "–" if theirs is None else f"{theirs / seconds:.1f}"]
        for label, seconds in ways.items()
    ]
    count = max(map(len, found["ways"].values()), default=0)
    phases = ", ".join(f"{key} {value:.3f} s" for key, value in found["phases"].items() if value >= 5e-4)
    lines = [
        f"ROME at layer {found['layer']}, {count} facts one by one, 20 passes each:",
        "",
        *table(["", "seconds per edit", "ratio to EasyEdit"], rows),
        "",
        f"Where an edit spends them as it is: {phases}.",
    ]
    if found["captures"]:
        lines.append(f"To record the passes of an edit takes {fmean(found['captures']):.3f} s of it.")
    if (apart := found["largest difference of a loss"]) is not None:
        lines.append(f"Losses of recorded passes are within {apart:.2g} of the others', relative to them.")
    return lines + [f"{label} failed: {error}" for label, error in found["errors"].items()]


def _contract(found: Mapping) -> list[str]:
    lines = [
        f"{found['tests']} tests in {found['seconds']:.0f} s: {found['failures'] + found['errors']} failed, "
        f"{found['skipped']} skipped."
    ]
    return lines + [f"* `{name}`: {reason}" for name, reason in found["broken"].items()]


def _real(found: Mapping) -> list[str]:
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in found["wall seconds"].items())
    lines = [found["table"], "", f"Seconds of the clock for all facts of both sets, reading included: {seconds}."]
    lines += [f"{name} failed: {error}" for name, error in found["errors"].items()]
    return lines + [f"{name}: {reason}." for name, reason in found["left out"].items()]


TABLES: dict[str, Callable[[Mapping], list[str]]] = {
    "machine": _machine,
    "memit-1000": _memit,
    "rome": _rome,
    "contract": _contract,
    "memit-10000": _memit,
    "real": _real,
}
