"""Do the instructions that a search found help on other cases, with an editor that was trained longer?

    reknow instruct --tasks counterfact,zsre --out runs/search
    reknow study tasks --out runs/instructedit
    python benchmarks/instructions.py runs/search --editor runs/instructedit/editors/counterfact-recent-convsent-0 \
        --out runs/again

Of each search the instructions with the best mean scores, and the one that it began with, are tried on the test cases
of the task, which neither a search nor an editor of the studies has seen. The difference is that of the means of all
metrics to the first instruction, on the same cases, with its 95 % interval. Where the editor was trained with the
first one, that one has an advantage. The folder keeps what was tried: the same command goes on where it was.
"""

import argparse
from pathlib import Path

from reknow import LM, InstructEdit
from reknow.cli.places import INSTRUCTIONS
from reknow.datasets.families import load_families
from reknow.files.json_lines import Rows
from reknow.files.manifest import open_manifest
from reknow.instructions.search import SCORES_FILE, difference, mean, mean_of_cases
from reknow.instructions.trial import FamilySplit, InstructionScorer

CASES, BEST = 50, 3


def found(searches: list[str]) -> dict[str, dict[str, str]]:
    """Task → instruction → the search that it is from, "" of what a search began with, which comes first."""
    texts: dict[str, dict[str, str]] = {}
    for folder in searches:
        rows = Rows.reading(Path(folder) / SCORES_FILE, ("family", "text")).values()
        texts |= {row["family"]: {} for row in rows if row["family"] not in texts}  # in the order of the search
        for row in sorted(rows, key=lambda row: (row["round"] > 0, -mean(row["scores"]))):
            of = texts[row["family"]]
            if not row["round"] or list(of.values()).count(folder) < BEST:
                of.setdefault(row["text"], folder if row["round"] else "")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("searches", nargs="+", help="folders of reknow instruct")
    parser.add_argument("--editor", required=True)
    parser.add_argument("--model", default="demo:gpt2")
    parser.add_argument("--dtype")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    families = {k: v for folder in args.searches for k, v in load_families(Path(folder) / INSTRUCTIONS).items()}
    lm = LM(args.model, dtype=args.dtype)
    out = Path(args.out)
    open_manifest(out, {"model": lm.fingerprint.digest, "editor": args.editor}, {"kind": "instructions tried again"})
    tried = Rows(out / "tried.jsonl", ("family", "text"))
    for name, texts in found(args.searches).items():
        cases = FamilySplit.of(families[name], CASES).test
        score = InstructionScorer(lm, InstructEdit(editor=args.editor), {name: cases})
        first = None
        print(f"\n| {name}, {len(cases)} cases | from | mean | against the first |\n|---|---|---|---|")
        for text, source in texts.items():
            if (name, text) not in tried:
                tried.add({"family": name, "text": text, "values": score(families[name], text)})
            values = tried[name, text]["values"]
            first = values if first is None else first
            own, gain = mean({each: mean_of_cases(of) for each, of in values.items()}), difference(values, first)
            against = f"{100 * gain.mean:+.1f} [{100 * gain.low:.1f}, {100 * gain.high:.1f}]" if source else "–"
            print(f"| {text} | {source or 'the first'} | {100 * own:.1f} | {against} |", flush=True)


if __name__ == "__main__":
    main()
