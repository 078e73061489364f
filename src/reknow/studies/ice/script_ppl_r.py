"""PPL_r as the script of ICE's authors computes it: a token's probability is read at its own place, where the model
has seen it already, instead of one place before. A slip, but it is what the published numbers were made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from torch import Tensor

from reknow.edits import Case, Edit
from reknow.engine.jobs import Engine
from reknow.evaluation.long_text import written_ratio
from reknow.evaluation.results import UNEDITED_BEFORE, Results
from reknow.evaluation.run_folder import ROW_KEY
from reknow.files.json_lines import Rows
from reknow.lm import LM
from reknow.model.exclusive import exclusively

METRIC = "PPL_r@sampled_unshifted"
FILE = "script_ppl_r.jsonl"
"""In a run folder: for each row the ratio that the script would give."""


def measure_script_ppl_r(engine: Engine, cases: Sequence[Case], results: Results, folder: Path) -> None:
    """Computes the ratio for each text that the run has sampled behind a request, and keeps it in the run folder.

    Args:
        engine: has the unedited model.
    """
    edits = {case.edit.id or str(number): case.edit for number, case in enumerate(cases)}
    kept = Rows(folder / FILE, ROW_KEY)
    for place, row in _rows(results).items():
        edit, texts = edits[row["case"]], [one["text"] for one in row["readings"] if one.get("ppl_r") is not None]
        if texts and place not in kept:
            ratio = engine.ask(partial(_mean_ratio, edit=edit, texts=texts))
            kept.add(dict(zip(ROW_KEY, place, strict=True)) | {"value": ratio})


@exclusively
def _mean_ratio(lm: LM, edit: Edit, texts: Sequence[str]) -> float:
    arguments = edit.separator, unshifted_nll
    return fmean(written_ratio(lm, edit.text, edit.target_new, text, *arguments) for text in texts)


def with_script_ppl_r(results: Results, folder: Path) -> Results:
    """The results with what was kept; runs of earlier versions have it in their readings."""
    kept, added = Rows.reading(folder / FILE, ROW_KEY), {}
    for place, row in _rows(results).items():
        earlier = [one["ratios"][1] for one in row["readings"] if one.get("ratios")]
        if place in kept or earlier:
            value = kept[place]["value"] if place in kept else fmean(earlier)
            added[place if place in results.rows else (row["case"],)] = {METRIC: value}
    both = {key: {**results.added.get(key, {}), **added.get(key, {})} for key in [*results.added, *added]}
    return replace(results, added=both)


def _rows(results: Results) -> dict[tuple, dict]:
    """The rows of the unedited model and of the edited ones, all under keys of one form."""
    method, stage = UNEDITED_BEFORE
    unedited = {(method, 0, "", stage, case): row for (case,), row in results.before.items()}
    return {**unedited, **results.rows}


def unshifted_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token at its own place, in nats.

    Args:
        logits: (tokens, vocabulary) of the text.
        ids: (tokens,).

    Returns:
        (tokens,)
    """
    return -logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
