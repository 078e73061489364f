"""How methods do with nothing but their defaults on a model that others trained, beside what papers set.

    python benchmarks/real_models.py FOLDER --out runs/real --layer 3 --methods rome,ft-m,rome-paper:llama-2-7b
    python benchmarks/real_models.py FOLDER --out runs/tried --layer 3 --facts 21-40 --methods far=rome --set clamp=8
    python benchmarks/real_models.py --out runs/real --facts 1-20               # the table of what is there

Facts of CounterFact and of wiki_counterfact that the model knows, each edited by itself; facts 1 to 20 of a set are
for reporting, from 21 on for choosing settings. Read are all probes but those for fluency, teacher-forced, and the
norm of ΔW. The folder keeps a line per fact: what is there is not done again, whatever other rows are asked for, and
a killed run goes on. How often the unedited model gives the *true* answer says what an edit's generalization can be
measured against: a model that knows a fact by one wording does not know it by every one. `--layer` stands in for the
layer that is suggested for the model, in whatever methods take that one; of settings that a paper has for another
model, its layers are not taken. With `--rephrasings 3` an edit is given up to three wordings that CounterFact has of
its relation, none of which a probe asks, and only facts that have some are counted. Seconds are processor seconds of
one thread.
"""

import argparse
import hashlib
import json
import math
import time
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean

import torch

from reknow import LM, load_cases
from reknow.checks.bounds import field_types
from reknow.cli.measuring import methods_by_label, read_variants
from reknow.datasets.reading import read_sample
from reknow.evaluation.attempts import attempt_each
from reknow.evaluation.intervals import average_cases
from reknow.evaluation.metrics import case_metrics
from reknow.evaluation.probing import read_cases
from reknow.evaluation.readings import Reading
from reknow.files.atomic import write_json
from reknow.files.json_lines import Rows
from reknow.methods.as_published import AsPublished
from reknow.registry import method_settings
from reknow.texts.tables import to_markdown
from reknow.tracing.known import known_cases

SETS = "counterfact,wiki_counterfact"
UNEDITED, TRUE = "unedited", "unedited, the true answer"
EXACT = ("reliability", "generalization", "locality", "portability")
COLUMNS = [(kind, f"{kind}@teacher_forced_exact") for kind in EXACT]
COLUMNS += [(name, f"{name}@contrast") for name in ("ES", "PS", "NS", "S")]
PLAIN = [("norm of ΔW", "norm"), ("s", "seconds")]
TOGETHER = 10
"""Facts whose edits are made at a time; each is its own patch."""


class Study:
    """The rows of a folder, `rows.jsonl` and `before.jsonl`, and the facts that the model knows, `known.json`."""

    def __init__(self, out, rephrasings=0):
        self.out, self.rephrasings = Path(out), rephrasings
        self.rows = Rows(self.out / "rows.jsonl", ("model", "set", "case", "settings"))
        self.before = Rows(self.out / "before.jsonl", ("model", "set", "case"))

    def open(self, model, sets, **options):
        self.lm = LM(model, **options)
        self.name = Path(model).name
        self.sets = {name: self._known(name, path) for name, _, path in (one.partition(":") for one in sets)}

    def _known(self, name, path):
        """The cases of a set whose facts the model knows."""
        file, cases = self.out / "known.json", load_cases(name, path=path or None)
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        key = f"{self.lm.fingerprint.digest} {name} {len(cases)}"
        if key not in found:
            known = {case.edit.id for case in known_cases(self.lm, cases)}
            found[key] = [number for number, case in enumerate(cases) if case.edit.id in known]
            write_json(file, found)
        known = [self._reworded(without_fluency(cases[number])) for number in found[key]]
        return [case for case in known if case.edit.rephrasings or not self.rephrasings]

    def _reworded(self, case):
        """The case with other wordings of its relation, of those that its paraphrases do not have."""
        if not self.rephrasings:
            return case
        asked = [probe.prompt for probe in case.questions if probe.kind == "generalization"]
        others = [text for text in counterfact_wordings().get(case.edit.id, ()) if text != case.edit.prompt]
        free = [text for text in others if not any(case.edit.fill(text) in prompt for prompt in asked)]
        return replace(case, edit=replace(case.edit, rephrasings=tuple(free[: self.rephrasings])))

    def read_before(self, name, first, last):
        cases = self.sets[name][first - 1 : last]
        missing = [case for case in cases if (self.name, name, case.edit.id) not in self.before]
        for case, readings in zip(missing, read_cases(self.lm, missing, generate=False), strict=True):
            found = {"model": self.name, "set": name, "case": case.edit.id}
            self.before.add({**found, "readings": [reading.to_json() for reading in readings]})
        for number, case in enumerate(cases, first):
            readings = self._readings_before(name, case)
            self._add(name, case, number, UNEDITED, UNEDITED, case_metrics(readings, readings))
            if (self.name, name, case.edit.id, TRUE) not in self.rows:
                self._add(name, case, number, TRUE, TRUE, self._knowledge(case))
        return cases

    def _knowledge(self, case):
        """How often the unedited model gives the true answer where an edited one shall give the new one."""
        metrics = {}
        for kind in ("reliability", "generalization"):
            prompts = [probe.prompt for probe in case.questions if probe.kind == kind]
            if prompts:
                scores = self.lm.score(prompts, [case.edit.target_true] * len(prompts))
                metrics[f"{kind}@teacher_forced_exact"] = fmean(float(score.said) for score in scores)
        return metrics

    def _readings_before(self, name, case):
        row = self.before[self.name, name, case.edit.id]
        return [Reading.from_json(reading) for reading in row["readings"]]

    def _add(self, name, case, number, method, settings, metrics, **about):
        found = {"model": self.name, "set": name, "case": case.edit.id, "number": number, "method": method}
        self.rows.add({**found, "settings": settings, "metrics": metrics, **about})

    def run(self, label, method, name, cases, first, layer):
        """Edits the cases of the set `name` that have no row with these settings yet."""
        settings = digest(method, layer)
        numbered = list(enumerate(cases, first))
        left = [(n, case) for n, case in numbered if (self.name, name, case.edit.id, settings) not in self.rows]
        size = min(TOGETHER, method.edits_per_call)
        for part in (left[start : start + size] for start in range(0, len(left), size)):
            started = time.process_time()
            attempts = attempt_each(self.lm, method, [[case.edit] for _, case in part])
            seconds = (time.process_time() - started) / len(part)
            for (number, case), (made, costs) in zip(part, attempts, strict=True):
                readings = before = self._readings_before(name, case)
                if made is not None:
                    with self.lm.patched(made):
                        (readings,) = read_cases(self.lm, [case], generate=False)
                metrics = case_metrics(readings, before, failed=made is None)
                deltas = made.deltas.values() if made is not None else ()
                metrics |= {"norm": math.hypot(*(delta.norm() for delta in deltas)), "seconds": seconds}
                about = {"error": costs[0].error, "steps": costs[0].steps}
                raw = [reading.to_json() for reading in readings]
                self._add(name, case, number, label, settings, metrics, **about, readings=raw)

    def table(self, first, last, labels=None):
        """Markdown by model and set: the mean of every method over the facts asked for, with its interval."""
        groups = {}
        for row in self.rows.values():
            if first <= row["number"] <= last and (not labels or row["method"] in (UNEDITED, TRUE, *labels)):
                place = groups.setdefault((row["model"], row["set"]), {})
                place.setdefault((row["method"], row["settings"]), []).append(row)
        return "\n\n".join(f"**{model}, {name}**\n\n{one_table(rows)}" for (model, name), rows in groups.items())


def one_table(methods):
    """One set's table; several settings under one label stand one below the other, in the order in which they ran."""
    lines = []
    means = {key: average_cases([row["metrics"] for row in rows]) for key, rows in methods.items()}
    columns = [column for column in COLUMNS if any(column[1] in found for found in means.values())]
    for (label, settings), rows in methods.items():
        found = means[label, settings]
        cells = [percent(found[key]) if key in found else "–" for _, key in columns]
        cells += [f"{found[key].mean:.2f}" if found.get(key) else "–" for _, key in PLAIN]
        failed = sum(row.get("error") is not None for row in rows)
        lines.append([label + (f" ({failed} failed)" if failed else ""), str(len(rows)), *cells])
    header = ["method", "facts", *(name for name, _ in columns), *(name for name, _ in PLAIN)]
    return to_markdown([header, *lines])


def percent(mean):
    bounds = "" if mean.low is None else f" [{100 * mean.low:.0f}, {100 * mean.high:.0f}]"
    return f"{100 * mean.mean:.1f}{bounds}"


@cache
def counterfact_wordings():
    """Case → the prompts that CounterFact has of its relation."""
    relations, prompts = {}, defaultdict(dict)
    for record in read_sample("counterfact.jsonl"):
        rewrite = record.record("requested_rewrite")
        relations[f"counterfact/{record.fields['case_id']}"] = rewrite.text("relation_id")
        prompts[rewrite.text("relation_id")][rewrite.text("prompt")] = None
    return {case: tuple(prompts[relation]) for case, relation in relations.items()}


def without_fluency(case):
    return replace(case, probes=tuple(probe for probe in case.probes if probe.kind != "fluency"))


def digest(method, layer):
    """What tells one set of settings from the others, whatever it is called."""
    text = json.dumps([method_settings(method), layer], sort_keys=True, default=str)
    return f"{method.name} {hashlib.sha256(text.encode()).hexdigest()[:10]}"


def resolved(lm, method):
    """The method with its settings; of a paper's for another model the layers are left to the library."""
    if not isinstance(method, AsPublished):
        return method
    made = method.resolve(lm)
    places = {"layer", "layers"} & set(field_types(type(made)))
    if method.model is None or places & set(method.settings):
        return made
    return replace(made, **dict.fromkeys(places))


def read_range(text):
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", required=True)
    parser.add_argument("--methods", default="", help="NAME or LABEL=NAME, with commas between")
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of all, or LABEL.FIELD=VALUE")
    parser.add_argument("--sets", default=SETS, help="NAME or NAME:FILE, with commas between")
    parser.add_argument("--facts", type=read_range, default=(1, 20), help="which of the known facts, as 1-20")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--rephrasings", type=int, default=0, help="how many an edit is given at most")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study, (first, last) = Study(args.out, args.rephrasings), args.facts
    if args.model:
        study.open(args.model, args.sets.split(","))
        chosen = methods_by_label(read_variants(args.methods.split(",")), args.set) if args.methods else {}
        cases = {name: study.read_before(name, first, last) for name in study.sets}
        if args.layer is not None:
            study.lm.memo[("layer",)] = args.layer
        for label, method in chosen.items():
            for name, own in cases.items():
                study.run(label, resolved(study.lm, method), name, own, first, args.layer)
            print(study.table(first, last, [label]), end="\n\n", flush=True)
    print(study.table(first, last, args.methods and [one.label for one in read_variants(args.methods.split(","))]))


if __name__ == "__main__":
    main()
