"""What happens inside In-Context Editing, which no answer shows (Qi et al. 2024, arXiv 2406.11194, Figures 2 and 3).

* The loss at each step, for several temperatures of the sampling, static and dynamic targets.
* The most likely tokens behind the new answer, with and without the context, as the steps go.
* The consistency condition p(x | [c, q]) = p(x | q): the divergence of both sides before and after an edit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reknow.contract import Method
from reknow.editing.self_distillation import SEPARATOR, prepend_context
from reknow.edits import Edit
from reknow.errors import SINGLE_EDIT_ERRORS
from reknow.evaluation.stages import UNEDITED
from reknow.files.json_lines import Rows
from reknow.files.locks import write_lock
from reknow.files.manifest import open_manifest
from reknow.lm import LM
from reknow.methods.ice import ICE, INTRODUCTIONS
from reknow.model.exclusive import exclusively
from reknow.model.scored_tokens import ScoredTokens, predictions
from reknow.model.scoring import kl_divergence
from reknow.model.tokens import EncodedText, Text
from reknow.registry import method_settings

TEMPERATURES = (0.1, 1.0, 10.0, 100.0)
TARGETS = ("static", "dynamic")
SHOWN = (0, 6, 12, 18, 24)
"""Steps whose most likely tokens are shown."""
ROWS_FILE = "inside.jsonl"
KEY = ("part", "label", "edit")


@exclusively
def measure_convergence(lm: LM, edits: Sequence[Edit], methods: Mapping[str, Method], out: Path) -> Rows:
    """Measures all three for the edits, each by itself; started again on the folder, it goes on where it was.

    The folder gets `manifest.json` and `inside.jsonl`, a line per part, setting and edit, as returned.
    `studies.ice.convergence_page.write_convergence` makes a page of it.

    Args:
        methods: label → method, for the consistency condition. The losses are those of ICE as it is by default,
            without an early end.

    Raises:
        InputError: the folder was started with other settings, or another process writes there.
    """
    settings = {
        "model": lm.fingerprint.digest,
        "edits": [[edit.text, edit.target_new] for edit in edits],
        "methods": {label: method_settings(method) for label, method in methods.items()},
        "losses": method_settings(ICE(stop_loss=0.0)),
    }
    with write_lock(out):
        open_manifest(out, settings, {"model": lm.name, "dtype": str(lm.dtype).removeprefix("torch.")}, _former)
        rows = Rows(out / ROWS_FILE, KEY)
        total = len(edits) * (len(TARGETS) * len(TEMPERATURES) + 1 + len(methods))
        with lm.progress.stage("edits", total, done=len(rows)) as advance:
            for row in chain(_losses(lm, edits, rows), _consistency(lm, edits, methods, rows)):
                rows.add(row)
                advance()
    return rows


def _former(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as written when those of the losses had no name."""
    return {**settings, "losses": {"name": "ice", **settings["losses"]}}


def _losses(lm: LM, edits: Sequence[Edit], rows: Rows) -> Iterator[dict]:
    """A descent for every edit, target and temperature; of the first edit the most likely tokens too."""
    for targets in TARGETS:
        for temperature in TEMPERATURES:
            label = f"{targets}, T = {temperature:g}"
            for number, edit in enumerate(edits):
                if ("losses", label, number) in rows:
                    continue
                shown = number == 0 and targets == "dynamic" and temperature == TEMPERATURES[-1]
                method = replace(ICE(stop_loss=0.0), targets=targets, temperature=temperature)
                row: dict = {"part": "losses", "label": label, "edit": number}
                try:
                    notes = method.edit(lm, [edit]).notes
                    tokens = {"likeliest": _most_likely_by_step(lm, method, edit)} if shown else {}
                except SINGLE_EDIT_ERRORS as failure:
                    yield row | {"error": str(failure)}
                    continue
                yield row | {key: notes[key] for key in ("losses", "answer_losses", "repetitions")} | tokens


def _most_likely_by_step(lm: LM, method: ICE, edit: Edit) -> list[dict[str, list[str]]]:
    """The most likely tokens behind the new answer after each of the steps `SHOWN`, by descents that end there."""
    (context, *_), found = method.contexts_of(edit), []
    for at in SHOWN:
        with lm.patched(replace(method, steps=at + 1).edit(lm, [edit])):
            found.append(most_likely_tokens(lm, edit, context))
    return found


def _consistency(lm: LM, edits: Sequence[Edit], methods: Mapping[str, Method], rows: Rows) -> Iterator[dict]:
    """The divergence of every edit, before all and after it by each method."""
    for label, method in {UNEDITED: None, **methods}.items():
        for number, edit in enumerate(edits):
            if ("consistency", label, number) in rows:
                continue
            row: dict = {"part": "consistency", "label": label, "edit": number}
            try:
                with lm.patched(*([] if method is None else [method.edit(lm, [edit])])):
                    found = {"divergence": consistency(lm, [edit])[0], **_answered(lm, edit)}
            except SINGLE_EDIT_ERRORS as failure:
                found = {"error": str(failure)}
            yield row | found


def _answered(lm: LM, edit: Edit) -> dict:
    (score,) = lm.score([edit.text], [edit.target_new], [edit.separator])
    return {"success": float(score.said), "nll": score.nll if math.isfinite(score.nll) else None}


@torch.no_grad()
def consistency(
    lm: LM,
    edits: Sequence[Edit],
    *,
    contexts: Literal["any", "given", "statement"] = "any",
    introductions: Sequence[str] = INTRODUCTIONS,
    separator: str = SEPARATOR,
) -> list[float]:
    """How far the model is from the consistency condition p(x | [c, q]) = p(x | q), which an edit should establish.

    Returns:
        By edit, KL(p(· | [c, q]) ‖ p(· | q)) in nats, a mean over the tokens of the new answer and the one behind it,
        over the edit's contexts and over the introductions.
    """
    method, found = ICE(contexts=contexts), []
    for edit in edits:
        (plain,) = lm.encode([Text.asked(edit)])
        texts = [
            prepend_context(edit, context, introduction, separator)
            for context in method.contexts_of(edit)
            for introduction in introductions
        ]
        full = [
            EncodedText(row.ids[: row.prompt_length] + plain.target_ids, row.prompt_length)
            for row in lm.encode(texts)
        ]
        aware = _behind(lm, full).unflatten(0, (len(full), -1))
        found.append(float(kl_divergence(aware, _behind(lm, [plain])).mean()))
    return found


def _behind(lm: LM, rows: Sequence[EncodedText]) -> Tensor:
    """Log-probabilities at the answer's tokens and at the one behind it, row by row. (n, vocabulary)"""
    places = [[*predictions(row, row.prompt_length), (len(row.ids) - 1, 0)] for row in rows]
    return ScoredTokens(lm, rows, places, None).log_probs()


@torch.no_grad()
def most_likely_tokens(lm: LM, edit: Edit, context: str, count: int = 6) -> dict[str, list[str]]:
    """The tokens that are the most likely ones behind the new answer, `with` the context in front and `without`."""
    found = {}
    for name, text in (("with", prepend_context(edit, context)), ("without", Text.asked(edit))):
        top = _behind(lm, lm.encode([text]))[-1].topk(count).indices
        found[name] = [lm.tokenizer.decode(token) for token in top]
    return found
