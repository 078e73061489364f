"""Files of edits: a user's own, or any published form."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from reknow.checks.arguments import typed
from reknow.datasets import own
from reknow.datasets.forms import DATASETS, form_of
from reknow.datasets.reading import read_file
from reknow.edits import Edit
from reknow.errors import InputError


@typed
def load_edits(path: str | Path, *, encoding: str | None = None) -> list[Edit]:
    """Read the edits of a JSON, JSON-lines or CSV file.

    The form is known by its fields. In a file of one's own every object or row has `prompt` and `target_new`, and may
    have the other fields of `Edit`. The subject is given as `subject`, or marked in the prompt by braces: `The mother
    tongue of {Danielle Darrieux} is`. In a CSV file (ending `.csv` or `.tsv`) the entries of `context` and
    `rephrasings` are parted by ` | `. Of the published forms in `DATASETS` the edits are taken, an edit that several
    records ask for once, and what examines them is left.

    Args:
        encoding: of the file; None: what its byte order mark says, else UTF-8.

    Raises:
        InputError: unreadable file, unknown or missing field, two edits with one id, or what `Edit` refuses.
    """
    records = read_file(path, encoding=encoding)
    if not records:
        raise InputError(f"expected at least one edit in {path}; got none: add one with prompt and target_new")
    form = form_of(records)
    if form in (None, "own"):
        edits = [own.read_edit(record) for record in records]
    else:
        cases = [case for record in records if (case := DATASETS[form].read(form, record)) is not None]
        asked = {(edit.text, edit.target_new): edit for case in cases for edit in case.edits}
        edits = list(asked.values())
    for id, times in Counter(edit.id for edit in edits if edit.id is not None).items():
        if times > 1:  # results are kept under it
            raise InputError(f"expected a different id for every edit in {path}; got {id!r} twice: rename one")
    return edits
