"""A user's own edits: records whose fields are those of `Edit`, and questions of the user's own."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from reknow.datasets.probes import read_probes
from reknow.datasets.reading import Record
from reknow.edits import Case, Edit, Kind, Probe
from reknow.errors import InputError, did_you_mean

_EDIT = tuple(field.name for field in fields(Edit) if field.init)
_LISTS = ("context", "rephrasings")
QUESTIONS: tuple[Kind, ...] = ("locality", "portability")
_FIELDS = (*_EDIT, *QUESTIONS)


def read_edit(record: Record) -> Edit:
    """The edit of a record; what examines it is passed over.

    Raises:
        InputError: unknown or missing field, or what `Edit` refuses.
    """
    for name in record.fields:
        if name not in _FIELDS:
            raise InputError(f"{record.where}: {did_you_mean('field', str(name), _FIELDS)}")
    values: dict[str, Any] = {}
    for name in filter(record.has, [name for name in _EDIT if name != "separator"]):
        values[name] = record.texts(name) if name in _LISTS else record.text(name)
    if record.fields.get("separator") is not None:  # white space counts there
        values["separator"] = record.fields["separator"]
    prompt = record.text("prompt")
    record.text("target_new")
    del values["prompt"]
    try:
        if "{" in prompt and "subject" not in values:
            return Edit.parse(prompt, **values)
        return Edit(prompt, **values)
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None


def read_case(name: str, record: Record) -> Case:
    """The edit of a record with its questions, all of which may be missing.

    | field | becomes |
    |---|---|
    | `rephrasings` | generalization `rephrase`, and no training aid: a method does not see its test |
    | `locality`, `portability` (`[{"prompt": …, "answer": …}, …]`, or such lists by name) | probes of that kind |
    """
    edit = read_edit(record)
    texts = [edit.fill(text) for text in edit.rephrasings]
    probes = [Probe(text, (edit.target_new,), "generalization", "rephrase", edit.separator) for text in texts]
    for kind in QUESTIONS:
        probes += read_probes(record, kind, kind, kind)
    return Case(replace(edit, rephrasings=(), id=edit.id or f"{name}/{record.index}"), tuple(probes))
