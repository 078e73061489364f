"""The cases of a run as what the page's script reads: an index to search in, and behind it all probes as HTML."""

from __future__ import annotations

import base64
import gzip
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from reknow.evaluation.results import Results
from reknow.evaluation.stages import AFTER_EDIT, END
from reknow.files.strict_json import strict_json
from reknow.report.columns import NEW
from reknow.report.contents import Card, make_cards
from reknow.texts.templates import fill
from reknow.texts.writing import clip

MOST = 2000
"""Cases that a page holds."""
_CHUNK = 50
"""Cases whose probes are packed together: what opening one unpacks."""
_EXAMPLES = 3
"""Cases that stand in the page without a script, those that went wrong first."""


class CaseList(NamedTuple):
    """What of the cases goes into the page."""

    index: str
    """gzip and base64 of JSON: methods, relations, and a row per case."""
    chunks: list[str]
    """The same of lists of HTML, `_CHUNK` cases each."""
    count: int
    left_out: int
    relations: list[tuple[str, int]]
    """Requests that differ in their subjects alone, and how many cases each has; the most frequent first."""
    examples: list[Card]


def list_cases(results: Results, protocols: Sequence[str], draw: Callable[[Card], str]) -> CaseList | None:
    """The first cases of the run, `MOST` at most; None where nothing has been asked.

    Args:
        draw: a case as HTML, escaped.
    """
    methods, sequential = list(results.manifest["settings"]["methods"]), results.last_stage == END
    frequent = Counter(_relation(row["edit"]) for row in results.before.values())
    relations = [(text, count) for text, count in frequent.most_common() if count > 1]
    numbers = {text: number for number, (text, _) in enumerate(relations)}
    rows: list[dict[str, Any]] = []
    pages: list[str] = []
    chunks: list[str] = []
    examples: list[Card] = []
    left_out = 0
    for card in make_cards(results):
        if len(rows) == MOST:
            left_out += 1
            continue
        row = _index_row(card, methods, protocols, numbers.get(_relation(card.edit), -1))
        rows.append(row | {"lost": _lost(results, card.case, protocols)} if sequential else row)
        pages.append(draw(card))
        if len(pages) == _CHUNK:
            chunks.append(_packed(pages))
            pages = []
        if len(examples) < _EXAMPLES:
            examples.append(card)
    if not rows:
        return None
    if pages:
        chunks.append(_packed(pages))
    index = {"methods": methods, "chunk": _CHUNK, "rows": rows}
    return CaseList(_packed(index), chunks, len(rows), left_out, relations, examples)


def _relation(edit: Any) -> str:
    """The request without its subject."""
    return fill(edit["prompt"], "…") if edit.get("subject") else ""


def _index_row(card: Card, methods: Sequence[str], protocols: Sequence[str], relation: int) -> dict[str, Any]:
    written = {
        answer.who: answer.text
        for question in card.questions[:1]
        for answer in question.answers
        if answer.text is not None
    }
    scores = {
        protocol: [[round(part, 3) for part in own[method]] if method in own else None for method in methods]
        for protocol in protocols
        if (own := card.scores.get(protocol)) is not None
    }
    return {
        "id": card.case,
        "request": card.request,
        "old": clip(str(card.edit.get("target_true") or ""), 12),
        "new": clip(card.edit["target_new"], 12),
        "relation": relation,
        "wrote": [clip(written.get(method, ""), 12) for method in methods],
        "failed": [int(method in card.errors) for method in methods],
        "scores": scores,
    }


def _lost(results: Results, case: str, protocols: Sequence[str]) -> dict[str, list[int]]:
    """Protocol → method → 1 where the new answer was there right after the edit and is not at the end."""
    found: dict[str, list[int]] = {}
    for protocol in protocols:
        key = NEW.key(protocol)
        found[protocol] = []
        for method in results.manifest["settings"]["methods"]:
            then, now = (
                results.case_values.get((method, stage), {}).get(case, {}).get(key or "")
                for stage in (AFTER_EDIT, END)
            )
            found[protocol].append(int(then is not None and now is not None and now < then))
    return found


def _packed(value: Any) -> str:
    text = strict_json(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode()
