"""Where tasks and editors lie in the space of edit gradients: t-SNE and principal components (the article's Fig. 4).

4a   each task's edits by the single-task editors, the multi-task editor and InstructEdit; and those of Recent by
     all three
4b   ZsRE's edits, which none has learned, by an editor of Recent and one of Recent and CounterFact
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from reknow.datasets.families import load_families
from reknow.edits import Case
from reknow.errors import MissingExtra
from reknow.files.atomic import write_json
from reknow.learning.gradient_network import make_network
from reknow.learning.gradients import flat_factors
from reknow.lm import LM
from reknow.methods.instructedit import InstructEdit
from reknow.model.exclusive import exclusively
from reknow.model.tokens import Text
from reknow.studies.instructedit.editors import (
    HELD_OUT,
    INSTRUCT,
    LEARNED,
    MULTI,
    SINGLE,
    SMALL,
    TASKS,
    Budget,
    Editors,
    reading_cases,
    task_families,
)

_CASES = 40
"""Cases of each task."""
_RECENT = "recent"
_LEARNED_FROM = (("recent",), ("counterfact", "recent"))
"""Figure 4b: what the editors have learned whose gradients on ZsRE are compared; `scaling` has the second one."""


class _Points(NamedTuple):
    """A question: edit gradients, and what they belong to."""

    title: str
    labels: list[str]
    values: np.ndarray  # (edits, in), of length 1
    drawn: bool = True
    """Else only its silhouette is taken."""


def gradient_study(
    lm: LM,
    out: str | Path,
    budget: Budget = SMALL,
    *,
    families: str | None = None,
    on_progress: Callable[[str], object] = lambda text: None,
) -> list[str]:
    """Draws the edit gradients ∇̃u of the studies' editors, and says how far tasks and editors lie apart.

    Editors are those of the folder, or are trained as the other studies do.

    Returns:
        What was found, in lines; `gradients.png` and `gradients.json` are in the folder.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_score
    except ImportError:
        raise MissingExtra("scikit-learn", "analysis", "t-SNE of the gradients") from None
    from reknow.studies.instructedit.gradient_plot import Panel, gradient_figure

    known, folder, seed = task_families(families), Path(out), budget.seeds[0]
    trained = Editors(lm, folder, budget, families, known, on_progress)
    cases = {task: reading_cases(known[task], budget, unseen=False)[:_CASES] for task in TASKS}
    panels, scores = [], {}
    for found in _questions(trained, cases, seed):
        scores[found.title] = float(silhouette_score(found.values, found.labels))
        if not found.drawn:
            continue
        perplexity = min(30.0, (len(found.values) - 1) / 3)
        maps = {
            "t-SNE": TSNE(random_state=seed, perplexity=perplexity).fit_transform(found.values),
            "principal components": PCA(2, random_state=seed).fit_transform(found.values),
        }
        panels.append(Panel(found.title, found.labels, maps))
    gradient_figure(panels).savefig(folder / "gradients.png", dpi=200)
    write_json(folder / "gradients.json", {"silhouette": scores, "cases": {k: len(v) for k, v in cases.items()}})
    lines = [f"{title}: silhouette {value:+.3f}" for title, value in scores.items()]
    return [
        *lines,
        "(1: apart, 0: mixed; on vectors of length 1, before any projection)",
        f"wrote {folder}/gradients.png",
    ]


def _questions(trained: Editors, cases: dict[str, list[Case]], seed: int) -> Iterator[_Points]:
    """The rows of the figure."""
    lm, titles = trained.lm, {name: trained.known[name].title for name in TASKS}
    by_editor: dict[str, dict[str, np.ndarray]] = {
        SINGLE.label: {
            task: _edit_gradients(lm, trained.of(SINGLE, (task,), seed), cases[task]) for task in SINGLE.tasks
        }
    }
    for variant in (MULTI, INSTRUCT):
        editor = trained.of(variant, variant.tasks, seed)
        by_editor[variant.label] = {task: _edit_gradients(lm, editor, cases[task]) for task in TASKS}
    for label, of in by_editor.items():
        yield _joined(f"tasks, {label}", {titles[task]: points for task, points in of.items()})
    for label in (MULTI.label, INSTRUCT.label):  # to compare with the single-task editors, of which ZsRE has none
        of = {titles[task]: by_editor[label][task] for task in LEARNED}
        yield _joined(f"learned tasks, {label}", of)._replace(drawn=False)
    yield _joined(titles[_RECENT], {label: of[_RECENT] for label, of in by_editor.items()})
    learned_from = {}
    for tasks in _LEARNED_FROM:
        editor = trained.of(INSTRUCT, tasks, seed)
        learned_from[" & ".join(titles[task] for task in tasks)] = _edit_gradients(lm, editor, cases[HELD_OUT])
    yield _joined(f"{titles[HELD_OUT]}, after", learned_from)


def _joined(title: str, parts: dict[str, np.ndarray]) -> _Points:
    return _Points(
        title, [label for label, points in parts.items() for _ in points], np.concatenate([*parts.values()])
    )


@exclusively
@torch.no_grad()
def _edit_gradients(lm: LM, method: InstructEdit, cases: Sequence[Case]) -> np.ndarray:
    """∇̃u of each edit: what the network makes of u in the last changed layer's first matrix, summed over the tokens
    that predict the answer. Each such vector is scaled to length 1, so that only directions are compared, as the
    article does for this figure; nothing in training or editing is scaled by it. (cases, in)"""
    trained, tensors = method.load_trained(lm)
    network = make_network(trained, lm, tensors)
    families = load_families(method.families)
    name = lm.parts.mlp_in[max(trained.layers or ())][0]
    points = []
    for case in cases:  # one by one, so that none is padded
        instructed = trained.instruct(case, families).edit
        rows = lm.encode([Text.asked(instructed, instructed.instructed(instructed.text))])
        factors, _ = flat_factors(lm, network.names, rows)
        _, u = network(factors)[name]  # (n, in)
        points.append(u[-len(rows[0].target_ids) :].sum(0))
    stacked = torch.stack(points)
    return (stacked / stacked.norm(dim=1, keepdim=True)).cpu().numpy()
