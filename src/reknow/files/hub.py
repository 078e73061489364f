"""Folders in repositories of the Hugging Face hub: fetched at a revision, and written in one commit.

`huggingface_hub` does the work: HF_ENDPOINT names another hub, HF_TOKEN or `hf auth login` says who one is, and what
was fetched stays in its cache, where it is found without the hub too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from reknow.errors import InputError
from reknow.files.digests import file_digest
from reknow.files.outputs import HUB, MARK, STACK_FILE
from reknow.files.schema import FormatError, Strict, parse_json

CARD = "README.md"
"""What is shown of a repository."""
_KEPT = ".gitattributes"
"""The file that the hub itself puts into a new repository."""


@dataclass(frozen=True)
class Address:
    """A repository of the hub."""

    repository: str
    """owner/name."""
    revision: str | None = None
    """A branch, a tag or a commit; None: the default branch."""

    def __str__(self) -> str:
        return f"{HUB}{self.repository}" + (f"@{self.revision}" if self.revision else "")


class Record(Strict):
    """What `reknow.json` says of a repository that `push` wrote."""

    open: ClassVar[bool] = True

    written_by: str
    kind: str
    files: dict[str, str]
    """SHA-256 of the others by name."""

    @property
    def parts(self) -> list[str]:
        """The files that are shared, without the card."""
        return [name for name in self.files if name != CARD]


def is_address(name: object) -> bool:
    """Whether this is written as the address of a repository, hub:owner/name[@revision]."""
    return isinstance(name, (str, Path)) and str(name).startswith(HUB)


def read_address(text: str) -> Address:
    """Raises InputError where it is no address of a repository."""
    name, at, revision = text.removeprefix(HUB).partition("@")
    try:
        validate_repo_id(name)
        if not is_address(text) or name.count("/") != 1 or (at and not revision.strip()):
            raise HFValidationError
    except HFValidationError:
        raise InputError(f"expected {HUB}owner/name or {HUB}owner/name@revision; got {text!r}: write it so") from None
    return Address(name, revision or None)


def fetch(address: Address) -> Path:
    """A folder with the files of the repository at its revision, in the hub's cache; it is read only.

    Raises:
        InputError: there is none, or the hub does not give it and the cache has it not.
    """
    with _explained(address):
        return Path(snapshot_download(address.repository, revision=address.revision))


def read_record(folder: Path) -> Record | None:
    """What `push` noted in the folder of a repository; None where it did not write it."""
    try:
        record = parse_json(Record, (folder / MARK).read_bytes())
    except (OSError, FormatError):
        return None
    return record if record.written_by == "reknow push" else None


def fetch_pushed(address: Address) -> tuple[Record, Path]:
    """What `push` wrote there, and a folder with its files, each as it was pushed; the folder is read only.

    Raises:
        InputError: there is no such repository, it holds something else, or a file is not the one that was pushed.
    """
    folder = fetch(address)
    record = read_record(folder)
    if record is None:
        raise InputError(f"expected what `reknow push` wrote; {address} holds something else: check the name")
    for name in record.parts:
        file = folder / name
        inside = Path(os.path.normpath(file)).is_relative_to(folder) and not os.path.isabs(name)
        if not inside or not file.is_file() or file_digest(file) != record.files[name]:
            raise InputError(
                f"expected {name} of {address} as it was pushed; it is another file, or none: push it again"
            )
    return record, folder


def local(source: str | Path) -> Path:
    """Where the patch or the stack lies that is meant: a path is taken as it is, an address fetched and checked.

    Raises:
        InputError: there is no such repository, or it holds neither a patch nor a stack that was pushed.
    """
    if not is_address(source):
        return Path(source).expanduser()
    record, folder = fetch_pushed(address := read_address(str(source)))
    if record.kind == "stack" and STACK_FILE in record.parts:
        return folder
    if record.kind == "patch" and record.parts:
        return folder / Path(record.parts[0]).parts[0]  # an adapter is a folder of its own
    raise InputError(f"expected a patch or a stack at {address}; it holds {record.kind}: get it with `reknow pull`")


def send(address: Address, files: Mapping[str, Path | bytes], message: str, *, private: bool = False) -> str:
    """Makes these the files of the repository in one commit, which is all or nothing; its id. The repository is made
    if it does not exist.

    Raises:
        InputError: it holds other things than what `push` wrote, another commit came between, or the hub refuses.
    """
    api = HfApi()
    with _explained(address):
        api.create_repo(address.repository, private=private or None, exist_ok=True)
        parent = api.repo_info(address.repository, revision=address.revision).sha
        there = [name for name in api.list_repo_files(address.repository, revision=parent) if name != _KEPT]
        if there and not _is_ours(address.repository, parent):
            raise InputError(
                f"expected a repository that reknow pushed, or an empty one; {address} holds {there[0]}: take another"
            )
        operations = [
            *(CommitOperationDelete(name) for name in there if name not in files),
            *(CommitOperationAdd(name, content) for name, content in files.items()),
        ]
        commit = api.create_commit(
            address.repository, operations, commit_message=message, revision=address.revision, parent_commit=parent
        )
        return str(commit.oid)


def _is_ours(repository: str, revision: str | None) -> bool:
    try:
        return read_record(Path(hf_hub_download(repository, MARK, revision=revision)).parent) is not None
    except EntryNotFoundError:
        return False


@contextmanager
def _explained(address: Address) -> Iterator[None]:
    """What the hub's library raises becomes one sentence."""
    try:
        yield
    except RepositoryNotFoundError:
        why, remedy = "there is none, or it is private", "check the name, or log in with `hf auth login`"
    except RevisionNotFoundError:
        why, remedy = f"it has no revision {address.revision}", "give a branch, a tag or a commit that it has"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        why, remedy = "the hub does not answer, and the cache does not have it", "connect, or unset HF_HUB_OFFLINE"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = {401: "who you are is not known", 403: "you may not", 412: "another commit came between"}.get(
            status or 0, " ".join(str(error).split())[:200]
        )
        why = f"the hub refuses ({said})"
        remedy = "try again" if status == 412 else "log in with `hf auth login`, or take a repository of yours"
    except InputError:
        raise
    except Exception as error:  # of several libraries, by what is installed and what fails
        why, remedy = f"it cannot be had ({' '.join(str(error).split())[:200]})", "check the network and the disk"
    else:
        return
    raise InputError(f"expected the repository {address} of the hub; {why}: {remedy}") from None
