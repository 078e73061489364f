"""Long sequences: what is left of 1,000 or 20,000 edits that are all kept, and of the rest of the model.

    python benchmarks/sequence.py demo:smollm2 --out runs/sequence --methods ultraedit,stableedit --whole locft-bf
    python benchmarks/sequence.py demo:smollm2 --out runs/long --data counterfact-easyedit:FILE --edits 20000 \
        --turn 1000 --at 1000,5000,10000 --methods ultraedit,stableedit

Facts of the set in its order, known or not, without those that contradict an earlier one, are edited in turns of
`--turn`, each a patch on those before; with `--whole` all in one patch. At the points `--at`, and behind the last
edit, up to `--read` of the edits made so far are read, spread evenly, early ones included: every token of the answer
right, teacher-forced, locality as before all edits, means over cases with 95 % intervals; with the perplexity of a
few paragraphs of WikiText, and KL to the unedited model on them; at the end the share of right items in tasks
(`--ability`) too.
Seconds are processor seconds of one thread. The folder keeps each patch and a line per point: the same command goes
on where it was, and another one is refused. `--set` is as in `reknow bench`.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

import torch

from exam import KINDS, Exam
from real_models import percent
from reknow import LM
from reknow.cli.measuring import methods_by_label, read_variants
from reknow.datasets.text import held_out_texts
from reknow.errors import InputError
from reknow.evaluation.attempts import attempt
from reknow.evaluation.harness import run_tasks
from reknow.evaluation.held_out import HeldOut
from reknow.evaluation.intervals import Mean, average_cases
from reknow.files.atomic import write_json
from reknow.files.json_lines import Rows
from reknow.registry import method_settings
from reknow.studies.comparison import load_sets
from reknow.studies.preset import Selection
from reknow.texts.tables import to_markdown

UNEDITED = "unedited"
ABILITY = "lambada_like,choice,cloze"


class Study:
    """A folder with the points of all methods, `points.jsonl`, and their patches."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.lm = LM(args.model, **({"dtype": getattr(torch, args.dtype)} if args.dtype else {}))
        loaded = load_sets(Selection(args.data, args.edits, probes_per_name=2), one_patch=True)
        (self.cases,) = loaded.sets.values()
        edits = len(self.cases)
        self.points = sorted({at for at in args.at if at < edits and not at % args.turn} | {edits})
        refuse_others(self.out, self._settings())
        self.rows = Rows(self.out / "points.jsonl", ("method", "settings", "edits"))
        read = sorted({i for edits in self.points for i in spread(edits, args.read)})
        self.number = {i: k for k, i in enumerate(read)}
        self.exam = Exam(self.lm, [self.cases[i] for i in read])
        self.texts = HeldOut(self.lm, held_out_texts())

    def _settings(self):
        names = ("data", "edits", "turn", "read", "ability")
        given = {name: getattr(self.args, name) for name in names}
        return {"model": self.lm.fingerprint.digest, "dtype": str(self.lm.dtype), **given, "points": self.points}

    def read(self, label, settings, made, edits, seconds):
        """Reads the model as it is and keeps the point."""
        wanted = spread(edits, self.args.read) if edits else list(self.number)
        found = self.exam.right({self.number[i] for i in wanted})
        shares = {kind: average_cases([{kind: one} for one in of.values()])[kind] for kind, of in found.items() if of}
        perplexity, kl = self.texts.read(self.lm)
        asked = self.args.ability.split(",") if edits in (0, len(self.cases)) else []
        tasks = {name: fmean(run_tasks(self.lm, [name])[0].values) for name in asked if name}
        point = {"method": label, "settings": settings, "made": made, "edits": edits, "read": len(wanted)} | shares
        self.rows.add(point | {"perplexity": perplexity, "kl": kl, "ability": tasks, "seconds": seconds})
        print(self.table([self.rows[label, settings, edits]]), flush=True)

    def run(self, label, method, turn):
        """The sequence of a method; patches that a killed run kept are put on again."""
        edits, settings = len(self.cases), digest(method, turn)
        wanted, made = (self.points, f"turns of {turn}") if turn < edits else ([edits], "one patch")
        if all((label, settings, at) in self.rows for at in wanted):
            return
        seconds = 0.0
        with self.lm.restored_afterwards():
            for start in range(0, edits, turn):
                own = [edit for case in self.cases[start : start + turn] for edit in case.edits]
                file = self.out / "patches" / f"{quote(label, safe='')}-{settings}" / f"{start:06d}.patch"
                file.parent.mkdir(parents=True, exist_ok=True)
                clock = file.with_suffix(".seconds")
                started = time.process_time()
                patch, costs = attempt(self.lm, method, own, file)
                if not clock.exists():
                    write_json(clock, time.process_time() - started)
                seconds += json.loads(clock.read_text())
                failed = next((cost.error for cost in costs if cost.error is not None), None)
                if failed is not None:
                    print(f"{label}, from edit {start + 1}: {failed}", flush=True)
                if patch is not None:
                    self.lm.apply(patch)
                done = min(start + turn, edits)
                if done in wanted and (label, settings, done) not in self.rows:
                    self.read(label, settings, made, done, seconds)

    def table(self, rows):
        tasks = [name for name in self.args.ability.split(",") if name]
        columns = ["method", "made", "edits", "read", *KINDS, "perplexity", "KL", *tasks, "s an edit"]
        return to_markdown([columns, *(line(row, tasks) for row in rows)])


def spread(edits, count):
    """The numbers of `count` of so many edits, spread evenly."""
    return [i * edits // min(count, edits) for i in range(min(count, edits))]


def refuse_others(folder, settings):
    """Writes the settings of a new folder; raises InputError where it was begun with others."""
    file = folder / "settings.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
    begun = json.loads(file.read_text(encoding="utf-8"))
    differ = [name for name in settings if begun.get(name) != settings[name]]
    if differ:
        told = ", ".join(f"{name} {begun.get(name)}, not {settings[name]}" for name in differ)
        raise InputError(
            f"expected to go on with the sequence of {folder} as it was begun, with {told}: give the same again, or "
            "another --out"
        )


def digest(method, turn):
    """What tells one set of settings from the others, whatever it is called."""
    text = json.dumps([method_settings(method), turn], sort_keys=True, default=str)
    return f"{turn}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def line(row, tasks):
    shares = [percent(Mean(*row[kind])) if kind in row else "–" for kind in KINDS]
    abilities = [f"{100 * row['ability'][name]:.1f}" if name in row["ability"] else "–" for name in tasks]
    seconds = f"{row['seconds'] / row['edits']:.2g}" if row["edits"] else "–"
    edits = f"{row['edits']:,}" if row["edits"] else "–"
    numbers = [f"{row['perplexity']:.4g}", f"{row['kl']:.2g}"]
    return [f"`{row['method']}`", row["made"], edits, str(row["read"]), *shares, *numbers, *abilities, seconds]


def numbers(text):
    return [int(part) for part in text.split(",") if part]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", required=True)
    parser.add_argument("--methods", default="", help="NAME or LABEL=NAME, with commas between, in turns")
    parser.add_argument("--whole", default="", help="the same, all edits in one patch")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of all, or LABEL.FIELD=VALUE")
    parser.add_argument("--data", default="counterfact", help="NAME, NAME:FILE or FILE")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--turn", type=int, default=100)
    parser.add_argument("--at", type=numbers, default=[100, 300, 1000], help="edits, with commas between")
    parser.add_argument("--read", type=int, default=200)
    parser.add_argument("--ability", default=ABILITY, help="tasks of lm-evaluation-harness; empty: none")
    parser.add_argument("--dtype")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(args)
    if (UNEDITED, "", 0) not in study.rows:
        study.read(UNEDITED, "", "–", 0, 0.0)
    turns, whole = (read_variants(names.split(",")) if names else [] for names in (args.methods, args.whole))
    for label, method in methods_by_label([*turns, *whole], args.set).items():
        together = label in [one.label for one in whole]
        study.run(label, method.resolve(study.lm), len(study.cases) if together else args.turn)
    print(study.table(study.rows.values()))


if __name__ == "__main__":
    main()
