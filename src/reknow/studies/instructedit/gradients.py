"""Where the tasks lie in the space of edit gradients: t-SNE and principal components (the article's Figure 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
    INSTRUCT,
    MULTI,
    SMALL,
    TASKS,
    Budget,
    Editors,
    reading_cases,
    task_families,
)

_CASES = 40
"""Cases of each task."""


def gradient_study(
    lm: LM,
    out: str | Path,
    budget: Budget = SMALL,
    *,
    families: str | None = None,
    on_progress: Callable[[str], object] = lambda text: None,
) -> list[str]:
    """Draws the edit gradients ∇̃u of the multi-task editor and of InstructEdit, and says how far the tasks lie apart.

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
    from reknow.studies.instructedit.gradient_plot import gradient_figure

    known, folder, seed = task_families(families), Path(out), budget.seeds[0]
    cases = {task: reading_cases(known[task], min(_CASES, budget.test), unseen=False) for task in TASKS}
    labels = [task for task, found in cases.items() for _ in found]
    panels: dict[str, np.ndarray] = {}
    scores: dict[str, float] = {}
    for variant in (MULTI, INSTRUCT):
        editor = Editors(lm, folder, budget, families, known, on_progress).of(variant, variant.tasks, seed)
        points = _edit_gradients(lm, editor, [case for found in cases.values() for case in found])
        scores[variant.label] = float(silhouette_score(points, labels))
        perplexity = min(30.0, (len(points) - 1) / 3)
        panels[f"{variant.label}, t-SNE"] = TSNE(random_state=seed, perplexity=perplexity).fit_transform(points)
        panels[f"{variant.label}, principal components"] = PCA(2, random_state=seed).fit_transform(points)
    names: Mapping[str, str] = {name: known[name].title for name in TASKS}
    figure = gradient_figure(panels, [names[label] for label in labels])
    figure.savefig(folder / "gradients.png", dpi=200)
    write_json(folder / "gradients.json", {"silhouette": scores, "cases": {k: len(v) for k, v in cases.items()}})
    lines = [f"{label}: silhouette of the tasks {value:+.3f}" for label, value in scores.items()]
    return [
        *lines,
        "(1: apart, 0: mixed; on vectors of length 1, before any projection)",
        f"wrote {folder}/gradients.png",
    ]


@exclusively
@torch.no_grad()
def _edit_gradients(lm: LM, method: InstructEdit, cases: Sequence[Case]) -> np.ndarray:
    """∇̃u of each edit: what the network makes of u in the last changed layer's first matrix, summed over the tokens
    that predict the answer and scaled to length 1 (the article's L2-scaling). (cases, in)"""
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
