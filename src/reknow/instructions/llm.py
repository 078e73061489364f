"""Contexts for In-Context Editing, written by a language model behind an OpenAI-compatible server.

Nothing is sent anywhere unless an `LLM` is made and handed over; edits go to the server in clear text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reknow.edits import Edit
from reknow.errors import InputError
from reknow.files.atomic import append_line
from reknow.files.llm import LLM, NoAnswer
from reknow.files.locks import write_lock
from reknow.files.schema import FormatError, Listed, Strict, explain, parse_json, read_content
from reknow.files.strict_json import strict_json

__all__ = ["LLM", "NoAnswer", "answer_lines", "parse_statements", "read_contexts", "with_contexts"]

_log = logging.getLogger(__name__)

_STATEMENTS = 5
"""Contexts per edit, as in Qi et al. 2024."""

_PATIENCE = 2
"""After so many edits in a row without an answer the server is not asked any more."""

_NUMBERING = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):])?\s*")


def _context_question(edit: Edit, count: int = _STATEMENTS) -> str:
    """What the model is asked to write for an edit."""
    return (
        f"Take this as true: {edit.answered(edit.text, edit.target_new)}\n"
        f"Write {count} different short statements that someone could read who is to learn it. Say in each that the "
        f"answer is {edit.target_new}, with exactly these words. Give one statement per line and nothing else."
    )


def parse_statements(answer: str, edit: Edit, count: int = _STATEMENTS) -> tuple[str, ...]:
    """The statements of an answer: its lines without numbers and bullets, those that name the new answer.

    Empty where there are fewer than `count`, since then the model did not do as it was asked.
    """
    lines = answer_lines(answer)
    wanted = edit.target_new.strip().casefold()
    named = list(dict.fromkeys(line for line in lines if wanted in line.casefold()))
    return tuple(named[:count]) if len(named) >= count else ()


def answer_lines(answer: str) -> list[str]:
    """The lines of an answer without numbers and bullets."""
    return [_NUMBERING.sub("", line).strip() for line in answer.splitlines()]


def with_contexts(edits: Sequence[Edit], llm: LLM, *, kept: str | Path | None = None) -> list[Edit]:
    """The edits with contexts written by `llm`; those that have some keep them.

    An edit for which no usable answer comes stays without context, so that In-Context Editing takes its built-in
    lead-ins for it; the log says so.

    Args:
        kept: a JSON-lines file beside the cases, read first and added to, so that nothing is asked twice.

    Raises:
        InputError: the file is not one of these.
        MissingExtra: the package `openai` is not installed.
    """
    file = None if kept is None else Path(kept)
    try:
        known = read_contexts(file) if file is not None and file.exists() else {}
    except (OSError, FormatError) as error:
        raise InputError(f"expected a file of contexts at {kept}; {explain(error)}: give another name") from error
    result, failures = [], 0
    for edit in edits:
        context = edit.context or known.get((edit.text, edit.target_new), ())
        if not context and failures < _PATIENCE:
            try:
                answer = llm.ask(_context_question(edit), lambda text, edit=edit: bool(parse_statements(text, edit)))
            except NoAnswer as error:
                failures += 1
                _log.warning("%s; built-in lead-ins are used for %r", error, edit.text)
                if failures == _PATIENCE:
                    _log.warning("%s is not asked any more: built-in lead-ins are used from here on", llm.model)
            else:
                failures, context = 0, parse_statements(answer, edit)
                if file is not None:
                    _append(file, edit, context, llm.model)
        result.append(replace(edit, context=context))
    return result


class _Kept(Strict):
    """A line of the file of contexts."""

    text: str
    target_new: str
    context: Listed[str]
    model: str = ""


def read_contexts(file: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """The contexts that were written before; lines that are broken are passed over, and so asked for again."""
    contexts, broken = {}, []
    for number, line in enumerate(read_content(file).split(b"\n"), 1):
        try:
            if line.strip():
                record = parse_json(_Kept, line)
                contexts[record.text, record.target_new] = tuple(record.context)
        except FormatError as error:
            broken.append(f"line {number} ({error})")
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        _log.warning("%s: %s%s is no text with target_new and context; it is asked for again", file, broken[0], more)
    return contexts


def _append(file: Path, edit: Edit, context: tuple[str, ...], model: str) -> None:
    record = {"text": edit.text, "target_new": edit.target_new, "context": list(context), "model": model}
    with write_lock(file, wait=60):
        append_line(file, strict_json(record, ensure_ascii=False))
