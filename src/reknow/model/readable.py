"""Which questions of a case are asked with which answers, and which of them a model can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reknow.edits import Case, Edit, Probe
from reknow.errors import TextRefused
from reknow.model.decoder import Decoder
from reknow.model.tokens import Text
from reknow.texts.writing import prepend


def find_unreadable(lm: Decoder, cases: Sequence[Case], *, in_context: bool = False) -> list[str | None]:
    """Why the model cannot read one of a case's questions, for each case; None where it can read all.

    Args:
        in_context: they are also asked with the edit in front.
    """
    with lm.progress.stage(f"checking the lengths of {len(cases):,} cases"):
        return [_unread(lm, case, in_context) for case in cases]


def _unread(lm: Decoder, case: Case, in_context: bool) -> str | None:
    asked = [*case.asked, *(in_context_questions(case) if in_context else ())]
    try:
        texts = [Text(o.prompt, text, separator=o.separator) for edit, o in asked for text in scored_answers(edit, o)]
        lm.check_length(lm.encode(texts))
    except TextRefused as error:
        return str(error)


def in_context_questions(case: Case) -> list[tuple[Edit, Probe]]:
    """The case's questions with its edits as statements in front."""
    front = f"Fact: {case.statement}"
    return [(edit, replace(one, prompt=prepend(front, one.prompt))) for edit, one in case.asked]


def scored_answers(edit: Edit, probe: Probe) -> list[str]:
    """The answers to score: the probe's first, none for fluency; and both targets where CounterFact compares them.

    Neighbours are the locality probes whose right answer is the edit's true target.
    """
    own = next(iter(probe.answers), "")
    if edit.target_true is None or probe.kind not in ("reliability", "generalization", "locality"):
        return [own]
    if probe.kind != "locality" and own != edit.target_new:  # it asks for another of the edits made together
        return [own]
    if probe.kind == "locality" and edit.target_true not in probe.answers:
        return [own]
    return [own, edit.target_new, edit.target_true]
