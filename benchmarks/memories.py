"""Memories under 1, 100, 1,000 edits in a row: scores at checkpoints, seconds per edit and per query, size.

python benchmarks/memories.py --methods grace,wise --edits 100 --out runs/memories

Goes on where it was when it is started again. Writes `memories.md` and `over_time.png` in the run folder.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from reknow import LM, load_cases, method
from reknow.effect import known_cases
from reknow.evaluation.results import Results
from reknow.evaluation.runner import Plan, bench
from reknow.patches import Patch
from reknow.report.plots import over_time, save_png

QUERIES = 200
"""Prompts whose scoring is timed, with and without the memory."""
KINDS = ("reliability", "generalization", "locality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo:gpt2")
    parser.add_argument("--methods", default="grace,defer,melo,wise,calinet")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[1, 10, 100, 300])
    parser.add_argument("--out", type=Path, default=Path("runs/memories"))
    options = parser.parse_args()
    lm = LM(options.model)
    cases = known_cases(lm, load_cases("counterfact"))[: options.edits]
    checkpoints = tuple(at for at in options.checkpoints if at < len(cases))
    plan = Plan("sequential", checkpoints=checkpoints, fluency=False)
    names = options.methods.split(",")
    results = bench(lm, cases, [method(name) for name in names], options.out, dataset="counterfact", plan=plan)
    costs = {
        name: cost(lm, options.out / "patches" / f"{name}-0", [case.edit.text for case in cases]) for name in names
    }
    text = table(results, names, costs, len(cases))
    (options.out / "memories.md").write_text(text, encoding="utf-8")
    figure = over_time(results, "teacher_forced_exact")
    if figure is not None:
        save_png(figure, options.out / "over_time.png")
    print(text)


def cost(lm: LM, folder: Path, prompts: list[str]) -> tuple[float, float]:
    """(kilobytes of tensors per edit, milliseconds that the memory adds to the scoring of a prompt)."""
    patches = [Patch.load(file) for file in sorted(folder.glob("*.patch"))]
    numbers = sum(t.numel() * t.element_size() for patch in patches for t in patch.state.values())
    plain = _seconds(lm, prompts)
    with lm.stacked(patches):
        edited = _seconds(lm, prompts)
    return numbers / 1024 / sum(len(patch.edits) for patch in patches), 1000 * (edited - plain)


def _seconds(lm: LM, prompts: list[str]) -> float:
    """Per prompt, one after the other."""
    asked = (prompts * (1 + QUERIES // len(prompts)))[:QUERIES]
    started = time.perf_counter()
    for prompt in asked:
        lm.score([prompt], ["the"])
    return (time.perf_counter() - started) / len(asked)


def table(results: Results, names: list[str], costs: dict[str, tuple[float, float]], edits: int) -> str:
    """Markdown: a row per method and checkpoint."""
    lines = [
        "| method | edits | reliability | generalization | locality | s per edit | KB per edit | ms per query |",
        "|---|---|---|---|---|---|---|---|",
    ]
    stages = {int(s[3:]): s for _, s, _ in results.cells if s.startswith("at:")} | {edits: "end"}
    for name in names:
        for made, stage in sorted(stages.items()):
            cells = [results.cells.get((name, stage, f"{kind}@teacher_forced_exact")) for kind in KINDS]
            scores = " | ".join("–" if cell is None else f"{100 * cell.mean:.1f}" for cell in cells)
            seconds = results.cells.get((name, stage, "seconds@edit"))
            spent = "–" if seconds is None else f"{seconds.mean:.2f}"
            size, query = costs[name] if stage == "end" else (None, None)
            rest = f"{size:.1f} | {query:+.2f}" if size is not None else "– | –"
            lines.append(f"| `{name}` | {made} | {scores} | {spent} | {rest} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
