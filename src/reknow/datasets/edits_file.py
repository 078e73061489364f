"""A user's own edits: a JSON, JSON-lines or CSV file whose fields are those of `Edit`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from reknow.datasets.reading import Record, read_records, read_table, refuse_repeated
from reknow.edits import Edit
from reknow.errors import InputError, did_you_mean

FIELDS = tuple(field.name for field in fields(Edit) if field.init)
LISTS = ("context", "rephrasings")


def load_edits(path: str | Path, *, encoding: str | None = None) -> list[Edit]:
    """Read the edits of a file.

    Every object or row has `prompt` and `target_new`, and may have the other fields of `Edit`. The subject
    is given as `subject`, or marked in the prompt by braces: `The mother tongue of {Danielle Darrieux} is`.
    In a CSV file (ending `.csv` or `.tsv`) the entries of `context` and `rephrasings` are parted by ` | `.
    `encoding` is the file's; None: what its byte order mark says, else UTF-8.

    Raises:
        InputError: unreadable file, unknown or missing field, two edits with one id, or what `Edit` refuses.
    """
    path = Path(path)
    table = path.suffix.lower() in (".csv", ".tsv")
    records = (read_table if table else read_records)(path, str(path), encoding=encoding)
    if not records:
        raise InputError(f"expected at least one edit in {path}; got none: add one with prompt and target_new")
    edits = [_edit(record, table) for record in records]
    refuse_repeated((edit.id for edit in edits), str(path))
    return edits


def _edit(record: Record, table: bool) -> Edit:
    for name in record.fields:
        if name not in FIELDS:
            raise InputError(f"{record.where}: {did_you_mean('field', str(name), FIELDS)}")
    values = {name: value for name, value in record.fields.items() if value is not None}
    for name in values.keys() - {"separator"}:  # white space counts there
        if name not in LISTS:
            values[name] = str(values[name]) if name == "id" else record.text(name)
        elif table:
            values[name] = [entry.strip() for entry in values[name].split(" | ")]
        else:
            values[name] = record.texts(name)
    prompt = record.text("prompt")
    record.text("target_new")
    del values["prompt"]
    try:
        if "{" in prompt and "subject" not in values:
            return Edit.parse(prompt, **values)
        return Edit(prompt, **values)
    except InputError as error:
        raise InputError(f"{record.where}: {error}") from None
