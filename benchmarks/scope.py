"""How well SERAC's scope classifier tells apart what it has not seen, and what its threshold does.

    python benchmarks/scope.py --model demo:gpt2 [--editor FOLDER] [--figure FILE.png]

Cases: records 200 to 399 of CounterFact, since the classifier was designed on the 200 before; the bundled editors
have seen none of either. In scope: both paraphrases of each. Hard negatives: of its ten neighbourhood prompts the
five nearest to the edit by the model's own states. Same subject: three prompts of other records with this record's
subject, whose words do not occur in the record. Each pair by itself, and against a memory of all 200 edits, where a
paraphrase must also find its own edit.
"""

import argparse
import math
import random
from collections.abc import Sequence

import torch

from reknow import LM, SERAC, load_cases
from reknow.memories.embedding import embed_texts
from reknow.memories.serac.cases import ScopeCases

CASES, HARD, CROSSED = 200, 5, 3


def questions(lm, cases):
    """kind → [(index of the case, question)]."""
    asked, rng = ScopeCases(lm, cases), random.Random(0)
    found = {"paraphrases": [], "hard negatives": [], "same subject": []}
    for i, case in enumerate(cases):
        near = [probe.prompt for probe in case.probes if probe.kind == "locality"]
        likeness = embed_texts(lm, near) @ embed_texts(lm, [case.edit.text])[0]
        found["hard negatives"] += [(i, near[k]) for k in likeness.topk(min(HARD, len(near))).indices.tolist()]
        found["paraphrases"] += [(i, probe.prompt) for probe in case.probes if probe.kind == "generalization"]
        same_subject = [asked.same_subject(i, rng) for _ in range(CROSSED)]
        found["same subject"] += [(i, text) for text in same_subject if text is not None]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo:gpt2")
    parser.add_argument("--editor")
    parser.add_argument("--first", type=int, default=200, help="the first record")
    parser.add_argument("--figure")
    args = parser.parse_args()
    lm = LM(args.model)
    serac = SERAC(editor=args.editor)
    cases = load_cases("counterfact", offset=args.first, limit=CASES)
    patch = serac.edit(lm, [case.edit for case in cases])
    memory = serac.running_memory(lm, [patch])
    limit, alone = math.log(serac.threshold), {}
    print("| questions | number | right, one edit | right, 200 edits |\n|---|---|---|---|")
    for kind, pairs in questions(lm, cases).items():
        places, together = memory.scopes([text for _, text in pairs])
        own = memory.modules.log_p([cases[i].edit.text for i, _ in pairs], [text for _, text in pairs])
        alone[kind] = own.exp().tolist()
        if kind == "paraphrases":
            one = [p > serac.threshold for p in alone[kind]]
            many = [p > limit and k == i for p, k, (i, _) in zip(together, places, pairs, strict=True)]
        else:
            one = [p <= serac.threshold for p in alone[kind]]
            many = [p <= limit for p in together]
        shares = [f"{100 * sum(each) / len(each):.1f} %" for each in (one, many)]
        print(f"| {kind} | {len(pairs)} | {shares[0]} | {shares[1]} |", flush=True)
    table = calibration(alone["paraphrases"], alone["hard negatives"])
    other = calibration(alone["paraphrases"], alone["same subject"])
    print("\n| threshold | paraphrases | hard negatives | same subject |\n|---|---|---|---|")
    for row, also in zip(table, other, strict=True):
        numbers = [f"{100 * value:.1f}" for value in (row["in_scope"], row["out_of_scope"], also["out_of_scope"])]
        print(f"| {row['threshold']:.2f} | {' | '.join(numbers)} |")
    if args.figure:
        draw(table, other, serac.threshold, args.figure)


def calibration(inside: Sequence[float], outside: Sequence[float]) -> list[dict[str, float]]:
    """What each threshold from 0.05 to 0.95 would do: shares of pairs in scope and out of scope told rightly."""
    p_in, p_out = torch.tensor(inside), torch.tensor(outside)
    return [
        {
            "threshold": step / 20,
            "in_scope": float((p_in > step / 20).float().mean()),
            "out_of_scope": float((p_out <= step / 20).float().mean()),
        }
        for step in range(1, 20)
    ]


def draw(table, other, threshold: float, file: str) -> None:
    """The calibration curve: shares told rightly against the threshold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    x = [row["threshold"] for row in table]
    axes.plot(x, [100 * row["in_scope"] for row in table], label="paraphrases, in scope")
    axes.plot(x, [100 * row["out_of_scope"] for row in table], "--", label="hard negatives, out of scope")
    axes.plot(x, [100 * row["out_of_scope"] for row in other], ":", label="same subject, out of scope")
    axes.axvline(threshold, color="grey", linewidth=0.8)
    axes.set(xlabel="threshold on p", ylabel="told rightly, %", ylim=(50, 101))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
