"""What is shared on the hub: patches, stacks, trained editors, statistics; with a card and a record of the files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from reknow import __version__
from reknow.errors import InputError
from reknow.files.atomic import atomic_write, atomic_write_folder
from reknow.files.cache import cache_folder
from reknow.files.hub import CARD, Address, fetch_pushed
from reknow.files.locks import PATIENCE, write_lock
from reknow.files.outputs import MARK, STACK_FILE
from reknow.files.schema import FormatError, explain
from reknow.files.strict_json import strict_json
from reknow.files.tensors import read_tensors
from reknow.learning.editors import EDITOR_FILE, Editor
from reknow.model.fingerprint import Fingerprint
from reknow.patching.history import HISTORY_FILE
from reknow.patching.patches import Patch
from reknow.patching.peft_folder import is_adapter, own_files
from reknow.patching.stack import read_existing

_STATISTICS = "covariance-"
_WHAT = {
    "patch": "a patch: an edit of a language model that goes on and comes off again",
    "stack": "a stack: edits of a language model in order, and their history",
    "editor": "a trained editor, by which a method makes edits",
    "statistics": "covariances of a model's keys over general text, which edits take into account",
}
"""Kind of what is shared → what it is."""
_USE = {
    "patch": "reknow pull hub:{repo} my.patch\nreknow apply my.patch --stack mine --model {base}",
    "stack": 'reknow ask "…" --model hub:{repo} --beside',
    "editor": 'reknow pull hub:{repo} it\nreknow edit "…" "…" --method {method} --set editor=it --model {base}',
    "statistics": "reknow pull hub:{repo}",
}


@dataclass(frozen=True)
class Shared:
    """Something to share."""

    kind: str
    files: dict[str, Path | bytes]
    base: str | None
    """How its users name the base model, as far as is known."""
    fingerprints: tuple[Fingerprint, ...]
    """Of the bases of its parts."""
    rows: list[list[str]]
    """What is in it, for people: patches' ids, methods and edits, or the like."""
    method: str = ""


def gather(sources: Sequence[Path], base: str | None) -> Shared:
    """What these files or folders are.

    Args:
        base: how others name the base model.

    Raises:
        InputError, PatchError: they are nothing that can be shared, or are broken; a stack's base is a folder here.
    """
    if all(source.is_file() and source.name.startswith(_STATISTICS) for source in sources):
        return _statistics(sources, base)
    if len(sources) > 1:
        raise InputError(
            f"expected one patch, stack or editor, or files of statistics; got {len(sources)} paths: apply patches "
            "to a stack and share that"
        )
    (source,) = sources
    if (source / STACK_FILE).is_file():
        return _stack(source, base)
    if (source / EDITOR_FILE).is_file():
        return _editor(source / EDITOR_FILE, base)
    try:
        patch = Patch.load(source)
    except Exception:
        try:
            return _editor(source, base)
        except InputError:
            pass
        raise
    return Shared("patch", _patch_files(source, f"{patch.id}.patch"), base, (patch.base,), [_row(patch)])


def _row(patch: Patch) -> list[str]:
    edits = "; ".join(f"{edit.text} → {edit.target_new}" for edit in patch.edits[:5])
    more = f" and {len(patch.edits) - 5} more" if len(patch.edits) > 5 else ""
    return [f"`{patch.id}`", patch.method, f"{edits}{more}"]


def _patch_files(source: Path, name: str) -> dict[str, Path | bytes]:
    if not is_adapter(source):
        return {name: source.read_bytes()}
    return {f"{name}/{part}": (source / part).read_bytes() for part in sorted(own_files(source))}


def _stack(folder: Path, base: str | None) -> Shared:
    with write_lock(folder, wait=PATIENCE):  # so that its files belong together
        named, patches = read_existing(folder)
        text = (folder / STACK_FILE).read_text(encoding="utf-8")
        files: dict[str, Path | bytes] = {}
        for patch in patches:
            files |= _patch_files(folder / f"{patch.id}.patch", f"{patch.id}.patch")
        if (folder / HISTORY_FILE).is_file():
            files[HISTORY_FILE] = (folder / HISTORY_FILE).read_bytes()
    if base is None and os.path.exists(named):
        raise InputError(
            f"expected a base that others have too; that of {folder} is the folder {named}: name it as the hub does "
            "with --base"
        )
    base = base or named
    files[STACK_FILE] = strict_json({**json.loads(text), "base": base}, indent=1, ensure_ascii=False).encode()
    return Shared("stack", files, base, tuple(patch.base for patch in patches), [_row(patch) for patch in patches])


def _editor(file: Path, base: str | None) -> Shared:
    editor = Editor.load(file)
    row = [editor.method, editor.version, f"{len(editor.seen)} cases"]
    return Shared("editor", {EDITOR_FILE: file.read_bytes()}, base, (editor.base,), [row], editor.method)


def _statistics(sources: Sequence[Path], base: str | None) -> Shared:
    rows = []
    for source in sources:
        try:
            about = read_tensors(source).metadata
        except (OSError, FormatError) as error:
            raise InputError(
                f"expected statistics in {source}; it holds none ({explain(error)}): make them again"
            ) from error
        rows.append([about.get("name", ""), about.get("matrix", ""), f"{about.get('read', '')} tokens"])
    files: dict[str, Path | bytes] = {source.name: source.read_bytes() for source in sources}
    return Shared("statistics", files, base, (), rows)


def with_card(shared: Shared, address: Address) -> dict[str, Path | bytes]:
    """The files with the card `README.md` and the record `reknow.json`, which has a checksum of each."""
    files = {**shared.files, CARD: _card(shared, address).encode()}
    record = {
        "written_by": "reknow push",
        "kind": shared.kind,
        "version": __version__,
        "base": {
            "name": shared.base,
            "fingerprints": sorted({(one.structure, one.tokenizer, one.dtype) for one in shared.fingerprints}),
        },
        "files": {name: hashlib.sha256(bytes(content)).hexdigest() for name, content in files.items()},
    }
    return {**files, MARK: strict_json(record, indent=1, ensure_ascii=False).encode()}


def _card(shared: Shared, address: Address) -> str:
    base = shared.base or ""
    try:
        validate_repo_id(base)
        on_hub = base.count("/") == 1
    except HFValidationError:
        on_hub = False
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="reknow",
        tags=["reknow", "knowledge-editing", "model-editing", f"reknow-{shared.kind}"],
    )
    use = _USE[shared.kind].format(repo=address.repository, base=base or "BASE", method=shared.method)
    table = ["| | | |", "|---|---|---|", *("| " + " | ".join(map(_cell, row)) + " |" for row in shared.rows)]
    parts = [
        f"# {address.repository.rpartition('/')[2]}",
        f"This is {_WHAT[shared.kind]}, pushed by reknow {__version__}. Base model: {base or 'not named'}. "
        "It is JSON and tensors, no code; it is refused on another base than its own.",
        "\n".join(table),
        "How well the edits hold, and what else changed, is not part of this: `reknow verify` and `reknow check` "
        "measure a stack, `reknow bench` a method.",
        f"```sh\n{use}\n```",
    ]
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def pull(address: Address, out: Path | None) -> tuple[str, list[Path]]:
    """Fetches what `push` wrote and puts it at `out`, or statistics into the cache; what it is, and where it lies.

    Raises:
        InputError: there is no such repository, it holds something else, a file is not the one that was pushed, or
            there is something at `out`.
    """
    record, folder = fetch_pushed(address)
    if record.kind not in _WHAT:
        raise InputError(f"expected one of {', '.join(_WHAT)}; {address} holds {record.kind}: upgrade reknow")
    names = record.parts
    if record.kind == "statistics":
        if out is not None:
            raise InputError("expected no place for statistics, which go where edits look for them; leave it out")
        return record.kind, [_copied(folder / name, cache_folder() / Path(name).name) for name in names]
    if out is None or out.exists():
        raise InputError(f"expected a new name for the {record.kind}; got {out or 'none'}: give one")
    if len(names) == 1 and record.kind == "patch":
        return record.kind, [_copied(folder / names[0], out)]
    prefix = f"{Path(names[0]).parts[0]}/" if record.kind == "patch" else ""

    def write(new: Path) -> None:
        for name in names:
            (place := new / name.removeprefix(prefix)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, place)

    return record.kind, [atomic_write_folder(out, write, overwrite=False)]


def _copied(source: Path, place: Path) -> Path:
    copy: Callable[[str], object] = lambda new: shutil.copyfile(source, new)  # noqa: E731
    return atomic_write(place, copy)
