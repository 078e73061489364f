"""Memories under 1, 100 and 1,000 edits: scores, seconds per edit, what a query costs, size.

    python benchmarks/memories.py --out runs/memories --figure docs/figures/memories.png

`1`: facts edited each by itself, means over them. More: in turns of `--turn` edits, each turn a patch on those
before. First come the facts of CounterFact that the model knows, then the other records. Read are up to `--read` of
the edits made so far, spread evenly, none of them from record 850 on, where defaults were chosen: every token of the
answer right, teacher-forced. Times are CPU seconds. The folder keeps a line per point, and the same command goes on
where it was; a sequence that was killed begins anew.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from exam import KINDS, Exam
from reknow import LM, load_cases, method
from reknow.errors import EditFailed
from reknow.tracing.known import known_cases

TUNED = 850
"""Defaults were chosen on records from this one on."""
QUERIES, REPEATS = 40, 5
"""Questions whose scoring is timed, and how often; the quickest counts."""
METHODS = ("grace", "melo", "defer", "wise", "wise-retrieve", "calinet", "serac", "ike", "ike-easyedit", "ike-zero")
COLOURS = colormaps["tab10"].colors


class Study:
    """The points of all methods, kept in `points.jsonl`."""

    def __init__(self, args):
        self.args, self.lm = args, LM(args.model)
        records = load_cases("counterfact")
        apart = records[TUNED:] if args.tuned else records[:TUNED]
        known = known_cases(self.lm, apart)
        others = [case for case in apart if case not in known]
        self.readable = len(apart)
        self.cases = [*known, *others, *([] if args.tuned else records[TUNED:])][: max(*args.sizes, args.read)]
        self.sizes = sorted({min(size, len(self.cases)) for size in args.sizes} - {1})
        self.places = {size: self._spread(min(size, self.readable)) for size in self.sizes}
        wanted = sorted({i for places in self.places.values() for i in places} | set(range(args.read)))
        self.number = {i: k for k, i in enumerate(wanted)}
        self.exam = Exam(self.lm, [self.cases[i] for i in wanted])
        self.known = len(known)
        self.file = Path(args.out) / "points.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.points = [json.loads(line) for line in lines]

    def _spread(self, size: int) -> list[int]:
        count = min(size, self.args.read)
        return [i * size // count for i in range(count)]

    def read(self, places) -> dict[str, float]:
        """Percentages by kind, means over the cases in these places, of the model as it is now."""
        right = self.exam.right({self.number[i] for i in places})
        return {kind: 100 * sum(cases.values()) / max(1, len(cases)) for kind, cases in right.items()}

    def note(self, name, edits, rates, seconds, patches):
        numbers = sum(t.numel() * t.element_size() for patch in patches for t in patch.state.values())
        with self.lm.stacked(()):
            plain = self._query()
        with self.lm.stacked(patches):
            query = self._query() - plain
        made = sum(len(patch.edits) for patch in patches)
        point = {"method": name, "edits": edits, **rates, "seconds": seconds, "kilobytes": numbers / 1024 / made}
        self.points.append({**point, "milliseconds": 1000 * query})
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.points[-1]) + "\n")
        print(json.dumps(self.points[-1]), flush=True)

    def _query(self) -> float:
        """CPU seconds for a question, asked by itself."""
        found = []
        for case in self.cases[:QUERIES]:
            times = []
            for _ in range(REPEATS):
                started = time.process_time()
                self.lm.score([case.edit.text], ["the"])
                times.append(time.process_time() - started)
            found.append(min(times))
        return sum(found) / len(found)

    def has(self, name, edits) -> bool:
        return any((p["method"], p["edits"]) == (name, edits) for p in self.points)

    def alone(self, name, editor):
        """Each edit by itself."""
        places, patches, seconds, read = range(self.args.read), [], 0.0, []
        for i in places:
            started = time.process_time()
            patches.append(editor.edit(self.lm, [self.cases[i].edit]))
            seconds += time.process_time() - started
            with self.lm.patched(patches[-1]):
                read.append(self.read([i]))
        rates = {kind: sum(one[kind] for one in read) / len(read) for kind in KINDS}
        self.note(name, 1, rates, seconds / len(patches), patches[:1])

    def sequence(self, name, editor):
        seconds, patches = 0.0, []
        for start in range(0, self.sizes[-1], self.args.turn):
            with self.lm.stacked(patches):
                started = time.process_time()
                turn = self.cases[start : start + self.args.turn]
                try:
                    patches.append(editor.edit(self.lm, [case.edit for case in turn]))
                except EditFailed as error:
                    print(f"{name} broke down behind {start} edits: {error}", flush=True)
                    return
                seconds += time.process_time() - started
            made = start + len(turn)
            if made in self.sizes and not self.has(name, made):
                with self.lm.stacked(patches):
                    rates = self.read(self.places[made])
                self.note(name, made, rates, seconds / made, patches)

    def run(self):
        for label in self.args.methods:
            name, _, fields = label.partition(":")  # grace:epsilon=0.5 tries a setting
            pairs = [pair.split("=") for pair in fields.split(",") if pair]
            editor = method(name, **{key: json.loads(value) for key, value in pairs})
            if 1 in self.args.sizes and not self.has(label, 1):
                self.alone(label, editor)
            if self.sizes and not all(self.has(label, size) for size in self.sizes):
                self.sequence(label, editor)


def table(points) -> str:
    lines = [
        "| method | edits | reliability | generalization | locality | s per edit | KB per edit | ms per query |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in sorted(points, key=lambda p: ([*METHODS, p["method"]].index(p["method"]), p["edits"])):
        rates = " | ".join(f"{p[kind]:.1f}" for kind in KINDS)
        costs = f"{p['seconds']:.3f} | {p['kilobytes']:.1f} | {p['milliseconds']:+.2f}"
        lines.append(f"| `{p['method']}` | {p['edits']:,} | {rates} | {costs} |")
    return "\n".join(lines)


def figure(points) -> Figure:
    picture = Figure(figsize=(11, 5.4), layout="constrained")
    panels = picture.subplots(2, 3)
    costs = {"seconds": "CPU seconds per edit", "milliseconds": "CPU ms added to a query", "kilobytes": "KB per edit"}
    names = sorted({p["method"] for p in points}, key=lambda name: [*METHODS, name].index(name))
    sizes = sorted({p["edits"] for p in points})
    for panel, key in zip(panels.flat, (*KINDS, *costs), strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            mine = sorted((p["edits"], p[key]) for p in points if p["method"] == name)
            panel.plot(*zip(*mine, strict=True), "o-", color=colour, label=name, markersize=4, linewidth=1.4)
        panel.set_xscale("log")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.set_title(costs.get(key, f"{key}, %"), fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        if key in KINDS:
            panel.set_ylim(-3, 103)
        else:
            panel.set_yscale("linear" if key == "milliseconds" else "log")
            panel.set_xlabel("edits")
    handles = {line.get_label(): line for line in panels[0, 0].get_lines()}
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:gpt2")
    parser.add_argument("--out", required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="such as grace, or grace:epsilon=0.5")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--turn", type=int, default=10, help="edits per patch in the sequence")
    parser.add_argument("--read", type=int, default=50, help="edits that are read at a point")
    parser.add_argument("--tuned", action="store_true", help="only the records on which defaults were chosen")
    parser.add_argument("--figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    study = Study(args)
    known = min(study.known, len(study.cases))
    print(f"the first {known} of {len(study.cases)} facts are known to the model")
    study.run()
    print(table(study.points))
    if args.figure:
        figure(study.points).savefig(args.figure, dpi=130)


if __name__ == "__main__":
    main()
