"""What is a layer worth, and what does it take to find a good one?

    python benchmarks/layers.py MODEL --layers 0 2 3 4 5 6 8 10 13 16 --out runs/layers.jsonl
    python benchmarks/layers.py MODEL --layers 3 5 8 --tokens 5000 20000 100000 --out runs/layers.jsonl
    python benchmarks/layers.py MODEL --report --out runs/layers.jsonl

For every layer ROME with default settings edits facts that the model knows, each alone, and is read on their
rephrasings and neighbours; `--trials` makes trial edits as `try_layers` does, and traces facts. Of that the report
tells what each way of choosing a layer would have chosen, what its layer scores, and what it costs in processor
seconds. Facts from number 21 on are for choosing. What is in the file is not made again.
"""

import argparse
import json
import time
from itertools import combinations, product
from pathlib import Path
from statistics import fmean, harmonic_mean
from unittest.mock import patch as replaced

import torch

from exam import Exam
from reknow import LM, ROME, load_cases
from reknow.editing import layer_trials
from reknow.editing.covariance import keep_statistics
from reknow.editing.values import find_values
from reknow.methods import rome
from reknow.tracing.known import known_cases, known_facts

RATES = ("reliability", "generalization", "locality")
TOKENS = 20_000
TRIALS = ((20, TOKENS), (10, TOKENS), (20, 5_000))
"""Passes and tokens of C of the trial edits."""
DEPTHS = (0.1, 0.17, 0.25, 0.33, 0.5)


class Results:
    """Rows in a file, each made once."""

    def __init__(self, file: Path):
        self.file = file
        self.rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def has(self, **wanted) -> bool:
        return bool(self.some(**wanted))

    def some(self, **wanted) -> list[dict]:
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]

    def add(self, **row) -> None:
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def measure_edits(lm, results, cases, numbers, args) -> None:
    """ROME by default at every layer on every fact, with C of so many tokens; the cosine is that of the whole change
    with the one that C of the most tokens gives."""
    exam, found = None, {}

    def searched_once(lm, edits, layer, contexts, method):
        key = layer, tuple(edit.id for edit in edits)
        if key not in found:
            found[key] = find_values(lm, edits, layer, contexts, method)
        return found[key]

    for layer in args.layers:
        place, changes = {"kind": "edit", "data": args.data, "layer": layer}, {}
        for tokens in sorted(args.tokens, reverse=True):
            left = [i for i, fact in enumerate(numbers) if not results.has(**place, tokens=tokens, fact=fact)]
            if not left:
                continue
            exam = exam or Exam(lm, cases)
            started = time.process_time()
            with replaced.object(rome, "find_values", searched_once):
                patches = ROME(layer=layer, covariance_tokens=tokens).edit_each(lm, [cases[i].edit for i in left])
            seconds = (time.process_time() - started) / len(left)
            for i, made in zip(left, patches, strict=True):
                (delta,) = made.deltas.values()
                with lm.patched(made):
                    right = {kind: values[i] for kind, values in exam.right([i]).items() if i in values}
                    right |= successes(lm, cases[i])
                cosine = float(torch.cosine_similarity(delta.right, changes.setdefault(i, delta.right)))
                row = {**place, "tokens": tokens, "fact": numbers[i], "seconds": seconds, "norm": delta.norm()}
                results.add(**row, cosine=cosine, **right)


def successes(lm, case) -> dict[str, float]:
    """CounterFact's ES, PS and NS: the new answer is likelier than the old one; the old one with neighbours."""
    new, old = case.edit.target_new, case.edit.target_true
    if old is None:
        return {}
    kinds = {"reliability": "es", "generalization": "ps", "locality": "ns"}
    probes = [probe for probe in case.questions if probe.kind in kinds]
    scores = [lm.score([probe.prompt for probe in probes], [answer] * len(probes)) for answer in (new, old)]
    rates: dict[str, list[bool]] = {}
    for probe, a, b in zip(probes, *scores, strict=True):
        rates.setdefault(kinds[probe.kind], []).append((a.nll < b.nll) == (probe.kind != "locality"))
    return {name: fmean(values) for name, values in rates.items()}


def measure_trials(lm, results, args) -> None:
    """Trial edits as `try_layers` makes them, with fewer passes and fewer tokens as well, fact by fact."""
    started = time.process_time()
    relations = layer_trials.trial_relations()
    known = set(known_facts(lm, [fact for facts in relations for fact in facts]))
    edits = layer_trials._trial_edits(relations, known)
    if not results.has(kind="asked"):
        results.add(kind="asked", known=len(known), trials=len(edits), seconds=time.process_time() - started)
    if not results.has(kind="trace"):
        started = time.process_time()
        settings = layer_trials.Tracing(kinds=("mlp",), tokens="subject_last")
        effects = layer_trials.average(list(layer_trials.trace_facts(lm, [edit.fact for edit in edits], settings)))
        means = effects.effects["mlp"][layer_trials.TOKEN_CLASSES.index("Last subject token")].tolist()
        results.add(kind="trace", effects=means, seconds=time.process_time() - started)
    for steps, tokens in TRIALS:
        settings = layer_trials.ROME_SETTINGS | {"steps": steps, "covariance_tokens": tokens}
        with replaced.object(layer_trials, "ROME_SETTINGS", settings):
            for layer, (fact, edit) in product(args.layers, enumerate(edits)):
                row = {"kind": "trial", "layer": layer, "fact": fact, "steps": steps, "tokens": tokens}
                if not results.has(**row):
                    started = time.process_time()
                    rates = vars(layer_trials._score_layer(lm, layer, 0.0, [edit]))
                    results.add(**row, **{n: rates[n] for n in RATES}, seconds=time.process_time() - started)


def mean_rates(rows, names=RATES) -> dict[str, float]:
    return {name: fmean(row[name] for row in rows) for name in names if all(name in row for row in rows)}


def score(rows) -> float:
    return 100 * harmonic_mean(mean_rates(rows).values())


def report(layers: int, results: Results, data: str) -> None:
    """The tables: what each layer scores; what each way of choosing chooses."""
    edits = results.some(kind="edit", data=data)
    print("| C of | layer | facts | reliability | generalization | locality | score | ES | PS | NS | cosine | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for tokens, layer in sorted({(row["tokens"], row["layer"]) for row in edits}):
        rows = [row for row in edits if (row["tokens"], row["layer"]) == (tokens, layer)]
        rates = mean_rates(rows, (*RATES, "es", "ps", "ns"))
        shown = [f"{100 * rates[name]:.1f}" if name in rates else "–" for name in (*RATES, "es", "ps", "ns")]
        shown.insert(3, f"{score(rows):.1f}")
        more = mean_rates(rows, ("cosine", "seconds"))
        cosine = f"{more['cosine']:.3f}" if "cosine" in more else "–"
        print(f"| {tokens:,} | {layer} | {len(rows)} | {' | '.join(shown)} | {cosine} | {more['seconds']:.1f} |")
    by_layer = {layer: [row for row in edits if row["layer"] == layer and row["tokens"] == TOKENS]
                for layer in sorted({row["layer"] for row in edits})}  # fmt: skip
    truth = {layer: score(rows) for layer, rows in by_layer.items() if rows}
    print("\n| way | chosen | its score | seconds |\n|---|---|---|---|")
    for way, chosen, seconds in ways(layers, results, list(truth), truth):
        often = max(set(chosen), key=chosen.count)
        share = f"{often}" + (f" ({chosen.count(often) / len(chosen):.0%})" if len(chosen) > 1 else "")
        print(f"| {way} | {share} | {fmean(truth[layer] for layer in chosen):.1f} | {seconds:.0f} |")


def ways(layers: int, results: Results, tried: list[int], truth: dict[int, float]):
    """(name, what it chooses, of trials with each choice of facts, seconds) of every way."""
    yield "the best of these layers", [max(tried, key=lambda layer: truth[layer])], 0
    for depth in DEPTHS:
        yield f"depth {depth}", [min(tried, key=lambda layer: abs(layer - depth * (layers - 1)))], 0
    asked = sum(row["seconds"] for row in results.some(kind="asked"))
    for trace in results.some(kind="trace"):
        peak = max(tried, key=lambda layer: trace["effects"][layer])
        yield "where facts trace best", [peak], asked + trace["seconds"]
    for (steps, tokens), count in product(TRIALS, (8, 4, 2)):
        trials = [row for row in results.some(kind="trial", steps=steps, tokens=tokens) if row["layer"] in tried]
        chosen = []
        for facts in combinations(sorted({row["fact"] for row in trials}), count):
            rows = {layer: [r for r in trials if r["layer"] == layer and r["fact"] in facts] for layer in tried}
            chosen.append(max(tried, key=lambda layer: score(rows[layer])))
        if chosen:
            seconds = asked + count * fmean(row["seconds"] for row in trials) * len(tried)
            yield f"{count} trial facts, {steps} passes, C of {tokens:,}", chosen, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, nargs="+", default=[])
    parser.add_argument("--facts", type=int, nargs=2, default=[21, 40], metavar=("FIRST", "LAST"))
    parser.add_argument("--data", default="counterfact")
    parser.add_argument("--path")
    parser.add_argument("--tokens", type=int, nargs="+", default=[TOKENS])
    parser.add_argument("--trials", action="store_true", help="Make trial edits and traces instead.")
    parser.add_argument("--report", action="store_true", help="Only print the tables.")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results, lm = Results(args.out), LM(args.model)
    if args.report:
        return report(lm.layers, results, args.data)
    started = time.process_time()
    for tokens in sorted({TOKENS, *args.tokens, *([5_000] if args.trials else [])}):
        keep_statistics(lm, args.layers, tokens=tokens)
    print(f"statistics: {time.process_time() - started:.0f} s", flush=True)
    if args.trials:
        return measure_trials(lm, results, args)
    first, last = args.facts
    cases = load_cases(args.data, path=args.path)
    if not results.has(kind="known", data=args.data):
        known = {case.edit.id for case in known_cases(lm, cases)}
        results.add(kind="known", data=args.data, cases=[i for i, case in enumerate(cases) if case.edit.id in known])
    (known,) = results.some(kind="known", data=args.data)
    cases = [cases[i] for i in known["cases"][first - 1 : last]]
    measure_edits(lm, results, cases, range(first, first + len(cases)), args)


if __name__ == "__main__":
    main()
