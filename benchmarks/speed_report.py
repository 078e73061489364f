"""The tables of what `speed.py` has measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

KINDS = ("reliability", "generalization", "locality")
FIRST = ("statistics", "contexts", "edit")


def report(folder: Path) -> str:
    """All parts in the folder, each with the command that made it and the machine."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise SystemExit(f"expected results in {folder}; there are none: run a part first")
    return "\n\n".join(_part(file) for file in files)


def _part(file: Path) -> str:
    found = json.loads(file.read_text(encoding="utf-8"))
    shape, part, *_ = file.stem.split("-")
    about = found.pop("about")
    command = about["command"].replace("\n", " ")
    machine = ", ".join(f"{key} {value}" for key, value in about.items() if key not in ("command", "date"))
    tables = {
        "rome": _rome,
        "tuning": _tuning,
        "memit": _memit,
        "evaluation": _evaluation,
        "first": _first,
        "work": _work,
    }
    lines = tables.get(part, _scaling)(found)
    return "\n".join(
        [
            f"### {shape}, {part}",
            "",
            f"    python benchmarks/speed.py {command}",
            "",
            f"{about['date']}; {machine}.",
            "",
            *lines,
        ]
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows)]


def _rome(found: Mapping) -> list[str]:
    facts = found["facts"]
    labels = ["EasyEdit", *(label for label in facts[0] if label not in ("EasyEdit", "steps"))]
    seconds = {label: fmean(fact[label] for fact in facts) for label in labels}
    rows = []
    for label in labels:
        passes = fmean(fact["steps"][label] for fact in facts)
        ratio = seconds["EasyEdit"] / seconds[label]
        rows.append([label, f"{passes:.1f}", f"{seconds[label]:.3f}", f"{ratio:.1f}", *_scores(found, label)])
    head = f"ROME at layer {found['layer']}, {len(facts)} facts one by one:"
    return [head, "", *table(["", "passes", "seconds per edit", "ratio", *KINDS], rows)]


def _memit(found: Mapping) -> list[str]:
    rows = []
    for label in found["steps"]:
        each = found[label] / found["facts"]
        ratio = found["EasyEdit"] / found[label]
        passes = f"{found['steps'][label]:.1f}"
        rows.append([label, passes, f"{found[label]:.2f}", f"{each:.3f}", f"{ratio:.1f}", *_scores(found, label)])
    head = f"MEMIT in layers {found['layers']}, {found['facts']} facts in one call, λ = {found['weight']:.0f}:"
    lines = [head, "", *table(["", "passes", "seconds", "per fact", "ratio", *KINDS], rows)]
    for label in [key for key in found if key.endswith(" facts")]:
        count = int(label.split()[-2])
        each, theirs = found[label] / count, found["EasyEdit"] / found["facts"]
        lines += [
            "",
            f"{label}: {found[label]:.1f} s, {each:.3f} per fact, {' / '.join(_scores(found, label))}. "
            f"At its time per fact EasyEdit needs {count * theirs:.0f} s for them (extrapolated): a ratio of "
            f"{theirs / each:.1f}.",
        ]
    return lines


def _scores(found: Mapping, label: str) -> list[str]:
    return [f"{found['quality'][label][kind]:.1f}" for kind in KINDS]


def _evaluation(found: Mapping) -> list[str]:
    rows, names = [], {"teacher-forced": "teacher-forced answers", "fluency": "sampled text of 100 tokens per case"}
    sums: dict[str, float] = {"reknow": 0.0, "EasyEdit": 0.0}
    for key, name in names.items():
        for label, seconds in found[key].items():
            ratio = found[key]["EasyEdit"] / seconds
            rows.append([name, label, f"{seconds:.2f}", f"{ratio:.1f}"])
            if label in sums:
                sums[label] += seconds
    rows += [["both", label, f"{sums[label]:.2f}", f"{sums['EasyEdit'] / sums[label]:.1f}"] for label in sums]
    return [
        f"{found['cases']} cases, {found['questions']} questions; largest difference between the two sides' "
        f"token accuracies: {found['largest difference']:g}. All that reknow reads of these cases (contrast of both "
        f"targets and free generation too): {found['all that reknow reads']:.2f} s.",
        "",
        *table(["what", "", "seconds", "ratio"], rows),
    ]


def _first(found: Mapping) -> list[str]:
    rows = []
    for label, parts in found["seconds"].items():
        whole = sum(parts.values())
        ratio = sum(found["seconds"]["EasyEdit"].values()) / whole
        said = "yes" if found["said"][label] else "no"
        rows.append([label, *(f"{parts[part]:.1f}" for part in FIRST), f"{whole:.1f}", f"{ratio:.1f}", said])
    theirs = found["seconds"]["EasyEdit"]["statistics"] * found["their sample"] / found["texts"] / 3600
    return [
        f"ROME at layer {found['layer']}, in an empty cache; statistics of {found['tokens']} tokens in "
        f"{found['texts']} texts on both sides. The {found['their sample']} texts of EasyEdit's own settings would "
        f"take it {theirs:.2g} hours, were they no longer.",
        "",
        *table(["", *FIRST, "all", "ratio", "the model says it"], rows),
    ]


def _tuning(found: Mapping) -> list[str]:
    facts = found["facts"]
    labels = [label for label in facts[0] if label != "steps"]
    seconds = {label: fmean(fact[label] for fact in facts) for label in labels}
    rows = []
    for label in labels:
        passes = fmean(fact["steps"][label] for fact in facts)
        ratio = seconds["EasyEdit FT-M"] / seconds[label]
        rows.append([label, f"{passes:.1f}", f"{seconds[label]:.3f}", f"{ratio:.2f}", *_scores(found, label)])
    for label, one in found["together"].items():
        # Side by side the edits know nothing of each other, as one by one; the others train one matrix on all.
        apart = seconds["EasyEdit FT-M"] * len(facts)
        whole = found["together"]["EasyEdit FT-M, batches of 1"]["seconds"]
        each, best = one["seconds"] / len(facts), apart if "side by side" in label else whole
        ratio = best / one["seconds"]
        rows.append(
            [
                f"{label}, together",
                f"{one['steps']:.1f}",
                f"{each:.3f}",
                f"{ratio:.2f}",
                *_scores(found, f"{label}, together"),
            ]
        )
    header, sampling = ["", "passes", "seconds per edit", "ratio to EasyEdit", *KINDS], ""
    if "sampling" in found:
        sampling = f" The sampling of ICE's 25 steps by itself: {found['sampling']:.3f} s per edit."
    return [
        f"Layer {found['layer']}, {len(facts)} facts one by one, then all in one call.{sampling}",
        "",
        *table(header, rows),
    ]


def _scaling(found: Mapping) -> list[str]:
    ((label, rows),) = found.items()
    head = ["facts", "seconds", "per fact"]
    cells = [[row["facts"], f"{row['seconds']:.1f}", f"{row['seconds'] / row['facts']:.4f}"] for row in rows]
    if "GiB" in rows[0]:
        head.append("peak of the GPU's memory, GiB")
        cells = [[*cell, f"{row['GiB']:.1f}"] for cell, row in zip(cells, rows, strict=True)]
    return [f"{label}:", "", *table(head, cells)]


def _work(found: Mapping) -> list[str]:
    rate = max(found["matmul GFLOP/s"], found.get("oneDNN GFLOP/s", 0.0))
    rows = []
    for label, parts in found.items():
        if not isinstance(parts, Mapping):
            continue
        facts = found["facts of MEMIT"] if label.startswith("MEMIT") else 1
        for phase, one in parts.items():
            if one["seconds"] < 1e-3:
                continue
            work, seconds = one["flops"] / 1e9 / facts, one["seconds"] / facts
            speed = work / seconds
            rows.append([label, phase, f"{work:.2f}", f"{1000 * seconds:.0f}", f"{speed:.0f}", f"{speed / rate:.0%}"])
    return [
        f"Per fact ({found['facts of MEMIT']} facts of MEMIT in one call). A large matrix product runs at {rate:.0f} "
        f"GFLOP/s here, torch's own at {found['matmul GFLOP/s']:.0f}. The counter sees matrix products alone; those "
        "inside attention are not in it on a CPU.",
        "",
        *table(["", "phase", "GFLOP", "ms", "GFLOP/s", "of the machine's"], rows),
    ]
