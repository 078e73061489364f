"""Quality of mass editing: many facts in one batch, and many one after another.

    python benchmarks/mass_editing.py --out runs/mass        # the bundled GPT-2-shaped model
    python benchmarks/mass_editing.py --out runs/mass --figure docs/figures/mass_editing.png
    python benchmarks/mass_editing.py --out runs/turns --turns-only --sizes 200 --methods memit memit-held alphaedit

Facts of CounterFact that the model knows are edited at the layer that is suggested for it: 1, 10, 100 … in one patch
of the unedited model; and in turns of `--turn` facts, each turn a patch on those before. ROME writes one fact
after the other in both. Read are up to `--read` of the facts edited so far, spread evenly, early ones included: every
token of the answer right, teacher-forced; and the perplexity of a few paragraphs of WikiText. CPU seconds of a batch
say little: methods with the same search share it, and the first one pays. The folder keeps a line per point, and the
same command goes on where it was.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from exam import KINDS, Exam, one_search
from reknow import LM, load_cases, method
from reknow.datasets import sample_text
from reknow.editing.layer_choice import suggest_layer
from reknow.errors import EditFailed
from reknow.files.atomic import write_text
from reknow.tracing.known import known_cases

COLOURS = {"memit": "#0072B2", "emmet": "#E69F00", "pmet": "#009E73", "alphaedit": "#CC79A7", "rome": "#D55E00"}
FOLLOWERS = {"memit-held": "#56B4E9", "betaedit": "#8C564B", "evoedit": "#BCBD22", "sphere": "#7F7F7F"}
"""Methods made for sequences, in which they are asked for; `memit-held` is MEMIT with `hold_earlier`."""
PLAIN, TOKENS = 8, 128


class Study:
    """The points of all methods, kept in `points.jsonl`."""

    def __init__(self, args):
        self.args = args
        self.lm = LM(args.model)
        self.cases = known_cases(self.lm, load_cases("counterfact"))[: max(args.sizes)]
        self.sizes = sorted({min(size, len(self.cases)) for size in args.sizes})
        self.layer = suggest_layer(self.lm)
        self.exam = Exam(self.lm, self.cases)
        self.texts = sorted(sample_text(), key=len)[-PLAIN:]
        self.file = Path(args.out) / "points.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.points = [json.loads(line) for line in lines]

    def editor(self, name):
        if name == "memit-held":
            return method("memit", layers=(self.layer,), hold_earlier=True)
        fields = method(name).__dataclass_fields__
        place = {"layers": (self.layer,)} if "layers" in fields else {"layer": self.layer}
        return method(name, **place)

    def has(self, name, mode, facts):
        return any((p["method"], p["mode"], p["facts"]) == (name, mode, facts) for p in self.points)

    def note(self, name, mode, facts, seconds):
        """Reads the model as it is and keeps the point."""
        step = max(1, facts // self.args.read)
        found = self.exam.right(set(range(0, facts, step)))
        rates = {kind: 100 * sum(cases.values()) / max(1, len(cases)) for kind, cases in found.items()}
        perplexity = self.lm.perplexity(self.texts, TOKENS)
        point = {"method": name, "mode": mode, "facts": facts, **rates, "perplexity": perplexity, "seconds": seconds}
        self.points.append(point)
        text = "".join(json.dumps(each) + "\n" for each in self.points)
        write_text(self.file, text)
        print(json.dumps(point), flush=True)

    def batches(self, name):
        for size in self.sizes:
            if not self.has(name, "batch", size):
                started = time.process_time()
                patch = self.editor(name).edit(self.lm, [case.edit for case in self.cases[:size]])
                seconds = time.process_time() - started
                with self.lm.patched(patch):
                    self.note(name, "batch", size, seconds)

    def sequence(self, name):
        if self.has(name, "turns", self.sizes[-1]):
            return
        self.points = [p for p in self.points if (p["method"], p["mode"]) != (name, "turns")]  # begun, but killed
        turn = 1 if name == "rome" else self.args.turn
        seconds = 0.0
        with self.lm.restored_afterwards():
            for start in range(0, self.sizes[-1], turn):
                started = time.process_time()
                edits = [case.edit for case in self.cases[start : start + turn]][: self.sizes[-1] - start]
                try:
                    self.lm.apply(self.editor(name).edit(self.lm, edits))
                except EditFailed as error:
                    print(f"{name} broke down behind {start} facts: {error}", flush=True)
                    break
                seconds += time.process_time() - started
                done = start + len(edits)
                if done in self.sizes or done % self.args.every == 0:
                    self.note(name, "turns", done, seconds)

    def run(self):
        with one_search():
            for name in self.args.methods:
                if name != "rome" and not self.args.turns_only:  # ROME's batch is its sequence
                    self.batches(name)
        for name in self.args.methods:
            self.sequence(name)


def figure(points) -> Figure:
    picture = Figure(figsize=(11, 5.2), layout="constrained")
    panels = picture.subplots(2, 4, sharex="row")
    for row, mode, title in ((0, "batch", "facts in one batch"), (1, "turns", "facts, turn after turn")):
        for panel, kind in zip(panels[row], (*KINDS, "perplexity"), strict=True):
            for name, colour in (COLOURS | FOLLOWERS).items():
                mine = sorted((p["facts"], p[kind]) for p in points if (p["method"], p["mode"]) == (name, mode))
                if mine:
                    panel.plot(
                        *zip(*mine, strict=True), "o-", color=colour, label=name, markersize=3.5, linewidth=1.4
                    )
            panel.set_xlabel(title)
            panel.set_title(kind + ("" if kind == "perplexity" else ", %"), fontsize=10)
            panel.spines[["top", "right"]].set_visible(False)
            if row == 0:
                panel.set_xscale("log")
            if kind != "perplexity":
                panel.set_ylim(-3, 103)
            elif mine := [p[kind] for p in points if math.isfinite(p[kind])]:
                panel.set_yscale("log")
                panel.set_ylim(min(mine) * 0.9, min(max(mine), 1e6) * 1.2)
    handles = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return picture


def table(points) -> str:
    lines = ["| method | mode | facts | reliability | generalization | locality | perplexity | CPU seconds |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for p in points:
        numbers = [f"{p[kind]:.1f}" for kind in KINDS] + [f"{p['perplexity']:.1f}", f"{p['seconds']:.0f}"]
        lines.append(f"| `{p['method']}` | {p['mode']} | {p['facts']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:gpt2")
    parser.add_argument("--out", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100, 500])
    parser.add_argument("--turn", type=int, default=10, help="facts per patch in the sequence")
    parser.add_argument("--every", type=int, default=50, help="facts after which the sequence is read")
    parser.add_argument("--read", type=int, default=50, help="facts that are read at a point, about")
    parser.add_argument("--methods", nargs="+", default=list(COLOURS))
    parser.add_argument("--turns-only", action="store_true", help="nothing in one batch")
    parser.add_argument("--figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    study = Study(args)
    study.run()
    print(table(study.points))
    if args.figure:
        figure(study.points).savefig(args.figure, dpi=130)


if __name__ == "__main__":
    main()
