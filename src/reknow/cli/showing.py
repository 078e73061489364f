"""The command that says what is in a patch file, a stack folder or an export."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import Json
from reknow.cli.stacks import number_of_patches, say_patch, sentence
from reknow.cli.terminal import say, say_json, say_table, warn
from reknow.errors import MissingExtra

if TYPE_CHECKING:
    from reknow.export.about import ExportRecord


def show(
    source: Annotated[
        Path, typer.Argument(help="A patch, a stack (a path, or hub:owner/name), or an export.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Say what is in a patch file, a stack folder or an export."""
    from reknow.export.about import changed_files, is_export, read_record
    from reknow.files.hub import local
    from reknow.model.sources import is_gguf
    from reknow.patching.patches import Patch
    from reknow.patching.peft_folder import is_adapter
    from reknow.patching.stack import read_existing
    from reknow.patching.telling import describe

    named, source = source, local(source)
    if is_gguf(source):
        if find_spec("gguf") is None:
            raise MissingExtra("gguf", "gguf", f"the GGUF file {source}")
        from reknow.export.gguf_record import read_gguf_record

        record = read_gguf_record(source)
        return say_json(record.model_dump()) if as_json else _say_export(source, record)
    if is_export(source):
        record = read_record(source)
        changed = changed_files(source, record)
        if as_json:
            return say_json({**record.model_dump(), "changed": changed})
        _say_export(source, record)
        say(
            f"files: {len(record.files)}, {'as they were written' if not changed else 'not all as they were written'}"
        )
        for name in changed:
            warn(f"{source / name} is not what was written there")
        return None
    if not source.is_dir() or is_adapter(source):
        described = describe(Patch.load(source))
        return say_json(described) if as_json else say_patch(described)
    base, patches = read_existing(source)
    if as_json:
        return say_json({"base": base, "patches": [describe(patch) for patch in patches]})
    say(f"{named}: {base} with {number_of_patches(len(patches))}")
    rows = [[p.id, p.method, str(len(p.edits)), "; ".join(sentence(e) for e in p.edits[:3])] for p in patches]
    if rows:
        say_table(["id", "method", " edits", "what"], rows)


def _say_export(source: Path, record: ExportRecord) -> None:
    """What an export says of itself."""
    from reknow.export.about import KINDS

    base, measured = record.base, record.measured
    earlier = (record.model_extra or {}).get("from", {}).get("patches")
    say(f"{source}: {KINDS.get(record.kind, record.kind)}, written by reknow {record.versions.get('reknow')}")
    say(f"written: {record.written}")
    say(f"base: {base.name}" + (f", {base.model} on the hub" if base.model not in (None, base.name) else ""))
    say(f"base: structure {base.structure}, tokenizer {base.tokenizer}, {base.dtype}, weights {base.weights}")
    say(f"said ({measured.get('how')}): {measured.get('held')} of {measured.get('asked')} edits that were asked")
    if earlier:
        say(f"made of a file that has these patches already: {', '.join(map(str, earlier))}")
    rows = []
    for patch in record.patches:
        edits = patch.get("edits")
        told = [
            f"{str(edit.get('prompt')).replace('{}', str(edit.get('subject')))} → {edit.get('target_new')}"
            for edit in (edits if isinstance(edits, list) else [])
            if isinstance(edit, dict)
        ]
        rows.append([str(patch.get("id")), str(patch.get("method")), str(len(told)), "; ".join(told[:3])])
    if rows:
        say_table(["id", "method", " edits", "what"], rows)
