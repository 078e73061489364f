"""Task families and their instructions: one readable JSON file, bundled or your own.

    {"card": {…}, "families": {"counterfact": {"title": …, "data": …, "metadata": …, "input": "{prompt}",
     "target": "{target}", "instructions": [{"text": …, "seen": true, "scores": {…}}, …]}, …}}

InstructEdit (Zhang et al. 2024, arXiv 2402.16123, §3.2) puts one of a task's instructions in front of every edit:
nine in training (`seen`), a tenth kept to ask what an editor makes of words it has not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from reknow.datasets.records import Record
from reknow.datasets.sources import read_text
from reknow.edits import Case, Edit
from reknow.errors import EditRefused, InputError, did_you_mean
from reknow.files.atomic import write_json
from reknow.files.schema import FormatError, Object, parse_json

_BUNDLED = "instructions.json"


@dataclass(frozen=True)
class Instruction:
    """What a task asks of an editor, in words; `{}` stands for the edit's subject."""

    text: str
    seen: bool = True
    """May be trained on."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What the trial editor reached with it."""


@dataclass(frozen=True)
class Family:
    """Edits of one kind."""

    name: str
    title: str
    """How the instruction calls the task."""
    data: str
    """Name of the data set, for `load_cases`."""
    metadata: str
    """What is edited, for whoever writes instructions."""
    input: str = "{prompt}"
    """What becomes of an edit's prompt."""
    target: str = "{target}"
    """What becomes of its answer."""
    instructions: tuple[Instruction, ...] = ()

    def texts(self, *, seen: bool = True) -> list[str]:
        """The instructions that may be trained on, or the others.

        Raises:
            InputError: there is none.
        """
        texts = [each.text for each in self.instructions if each.seen == seen]
        if not texts:
            raise InputError(
                f"expected {'an instruction' if seen else 'an unseen instruction'} for the task {self.name!r}; got "
                "none: add one to its file, or search for some with `reknow instruct`"
            )
        return texts

    def instruct(self, case: Case, instruction: str) -> Case:
        """The case with its edit put into this task's templates, behind the instruction."""
        edit = case.edit
        subject = edit.subject or "the subject"
        changed = replace(
            edit,
            prompt=self.input.replace("{prompt}", edit.prompt),
            target_new=self.target.replace("{target}", edit.target_new),
            task=self.title,
            instruction=instruction.replace("{}", subject),
        )
        return replace(case, edit=changed)


def family_of(edit: Edit, families: Mapping[str, Family]) -> Family:
    """The family whose name or title is the edit's `task`; without one, that of the data set that its id names, or
    the only one.

    Raises:
        EditRefused: the edit names no task, or one that is not there.
    """
    if edit.task is None:
        for family in families.values():
            if len(families) == 1 or (edit.id or "").partition("/")[0] == family.data:
                return family
        raise EditRefused(
            f"expected an edit with a task, so that its instruction can be found; {edit.text!r} has none: set task "
            f"to one of {', '.join(families)}, or give the edit an instruction",
            edit,
        )
    for family in families.values():
        if edit.task in (family.name, family.title):
            return family
    raise EditRefused(str(did_you_mean("task", edit.task, families)), edit)


def load_families(path: str | Path | None = None) -> dict[str, Family]:
    """The task families of a file; without a path the bundled ones.

    Raises:
        InputError: unreadable file, or a family of another form (the field is named).
    """
    name = _BUNDLED if path is None else str(path)
    content = Record(_read_content(path), name, 0).record("families")
    return {key: _read_family(key, content.record(key)) for key in content.fields}


def load_card(path: str | Path | None = None) -> dict[str, Any]:
    """What a file says of itself: how its instructions were made, with which model, under which licence."""
    return Record(_read_content(path), _BUNDLED if path is None else str(path), 0).record("card").fields


def save_families(path: str | Path, families: Sequence[Family], card: Mapping[str, Any]) -> None:
    """Writes the file atomically."""
    content = {family.name: {k: v for k, v in asdict(family).items() if k != "name"} for family in families}
    write_json(Path(path), {"card": dict(card), "families": content})


def _read_content(path: str | Path | None) -> Any:
    source = files("reknow") / "assets" / _BUNDLED if path is None else Path(path)
    text = read_text(source, _BUNDLED if path is None else str(path))
    try:
        return parse_json(Object, text, once=True)
    except FormatError as error:
        raise InputError(f"expected JSON in {path or _BUNDLED}; got {error}: correct the file") from error


def _read_family(name: str, record: Record) -> Family:
    for place, piece in (("input", "{prompt}"), ("target", "{target}")):
        if piece not in record.text(place):
            record.refuse(place, f"expected a template with {piece}; got {record.text(place)!r}: put it in")
    listed = tuple(map(_read_instruction, record.records("instructions")))
    described = {key: record.text(key) for key in ("title", "data", "metadata", "input", "target")}
    return Family(name, **described, instructions=listed)


def _read_instruction(record: Record) -> Instruction:
    seen, scores = record.fields.get("seen", True), record.fields.get("scores", {})
    if not isinstance(seen, bool):
        record.refuse("seen", f"expected true or false; got {seen!r}: correct it")
    if not isinstance(scores, dict) or not all(type(value) in (int, float) for value in scores.values()):
        record.refuse("scores", f"expected metrics with numbers; got {str(scores)[:60]}: correct them")
    return Instruction(record.text("text"), seen, scores)
