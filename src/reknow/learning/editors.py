"""Editor: what a method that learns to edit has learned for one model, as a file that can be shared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

import reknow
from reknow.edits import Case, Edit
from reknow.errors import InputError
from reknow.files.outputs import EDITOR_FILE
from reknow.files.schema import FormatError, NewerFormat, Object, Strict, explain
from reknow.files.tensors import check_tensor, read_tensors, write_tensors
from reknow.lm import LM
from reknow.model.fingerprint import Fingerprint
from reknow.patching.patch_files import Base, Name
from reknow.registry import make

_FORMAT = 1


class _Header(Strict):
    """The JSON text of an editor's file."""

    format: Annotated[int, Field(ge=1, le=_FORMAT)]
    kind: Literal["editor"]
    method: Name
    settings: Object
    notes: dict[str, JsonValue]
    version: str
    base: Base


@dataclass(frozen=True, eq=False)
class Editor:
    """A trained editor. It belongs to one base model, whatever is applied to it."""

    method: str
    """Name in the table of methods."""
    settings: dict
    """The method's fields when it was trained, as JSON values."""
    tensors: dict[str, Tensor]
    """Parameters and statistics by name."""
    base: Fingerprint
    seen: Tensor  # (cases,) int64
    """`case_keys` of everything it learned from or was chosen by."""
    notes: dict = field(default_factory=dict)
    """Losses, steps, data. JSON values."""
    version: str = reknow.__version__
    """Release of the library that trained it."""

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whose header carries the rest as JSON; an old file stays until it is whole."""
        header = {
            "format": _FORMAT,
            "kind": "editor",
            "method": self.method,
            "settings": self.settings,
            "notes": self.notes,
            "version": self.version,
            "base": {"structure": self.base.structure, "tokenizer": self.base.tokenizer, "dtype": self.base.dtype},
        }
        tensors = {"base.samples": self.base.samples, "seen": self.seen}
        tensors |= {f"editor.{name}": tensor for name, tensor in self.tensors.items()}
        return write_tensors(path, tensors, header=header)

    @classmethod
    def load(cls, path: str | Path) -> Editor:
        """Reads an editor file, or the one in the folder where it was trained.

        Raises:
            InputError: there is no such file, or it is not an editor.
        """
        path = Path(path) / EDITOR_FILE if Path(path).is_dir() else Path(path)
        try:
            sealed = read_tensors(path)
            header, tensors = sealed.header(_Header), dict(sealed.tensors)
            base = header.base.fingerprint(tensors)
            seen = check_tensor("seen", tensors.pop("seen", None), "int64", 1)
            if others := [name for name in tensors if not name.startswith("editor.")]:
                raise FormatError(f"tensor {others[0]}: an editor has none of this name")
        except NewerFormat as error:
            raise InputError(f"expected editor format {_FORMAT}; {path} has {error}: upgrade reknow") from error
        except (OSError, FormatError) as error:
            why = (
                "there is no such file" if isinstance(error, FileNotFoundError) else f"it is none ({explain(error)})"
            )
            raise InputError(
                f"expected a trained editor at {path}; {why}: give a file that `reknow train` wrote"
            ) from error
        named = {name.removeprefix("editor."): tensor for name, tensor in tensors.items()}
        return cls(header.method, header.settings, named, base, seen, header.notes, header.version)


def open_editor(method: str, path: str | None, lm: LM) -> Editor:
    """The trained editor of the method of this name, on the model's device, in float32.

    Args:
        path: its file or folder; None: the one that is bundled for the model.

    Raises:
        InputError: none is given and none is bundled for this model; or it is of another method or model.
    """
    if path is None:
        editor, where = _bundled(method, lm), "the bundled editor"
    else:
        editor, where = Editor.load(path), path
    if editor.method != method:
        raise InputError(
            f"expected an editor for {method}; {where} is one for {editor.method}: give another, or use "
            f"{editor.method}"
        )
    if problem := editor.base.difference(lm.fingerprint):
        raise InputError(
            f"expected an editor that was trained for {lm.name}; {where} belongs to a model with {problem}: "
            f"train one with `reknow train {method} --model {lm.name}`"
        )
    tensors = {
        n: t.to(lm.device, torch.float32 if t.is_floating_point() else None) for n, t in editor.tensors.items()
    }
    return replace(editor, tensors=tensors)


def _bundled(method: str, lm: LM) -> Editor:
    """The editor of this method for this very model that comes with the library."""
    folder = files("reknow") / "assets" / "editors"
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name.startswith(f"{method}-") and name.endswith(".safetensors"):
            with as_file(folder / name) as path:
                editor = Editor.load(path)
            if editor.base.difference(lm.fingerprint) is None:
                return editor
    raise InputError(
        f"{method} learns to edit and needs an editor trained for {lm.name}; none is given and none is bundled: "
        f"train one with `reknow train {method} --model {lm.name} --data … --out FOLDER` and set editor=FOLDER"
    )


_Network = TypeVar("_Network", bound=nn.Module)


def trained_settings(editor: Editor) -> Any:
    """The method with the settings that the editor was trained with.

    Raises:
        InputError: they are none of this method.
    """
    try:
        return make(editor.method, editor.settings)
    except InputError as error:
        raise InputError(
            f"expected an editor with settings of {editor.method}; got others ({error}): train another with "
            f"`reknow train {editor.method}`"
        ) from error


def fill_network(build: Callable[[], _Network], tensors: Mapping[str, Tensor]) -> _Network:
    """The network that `build` gives, with what an editor has learned in the place of its first weights.

    It is built without memory, so that settings cannot ask for more of it than the tensors take.

    Raises:
        InputError: the tensors are not those of this network.
    """
    try:
        with torch.device("meta"):
            network = build()
        check_like("tensor ", tensors, network.state_dict())
        network.load_state_dict(dict(tensors), assign=True)
        return network
    except (FormatError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"expected an editor whose tensors fit its settings; got another ({error}): train one with `reknow train`"
        ) from error


def check_like(where: str, tensors: Mapping[str, Tensor], module: Mapping[str, Tensor]) -> None:
    """Raises FormatError where the tensors are not, by name and shape, those of the module."""
    shapes, wanted = ({name: tensor.shape for name, tensor in each.items()} for each in (tensors, module))
    if odd := [name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)]:
        raise FormatError(f"{where}{min(odd)}: expected {wanted.get(min(odd))}, got {shapes.get(min(odd))}")


def case_keys(cases: Iterable[Case]) -> Tensor:
    """What identifies the facts that are asked, whatever file they come from. (cases,) int64"""
    return torch.tensor([edit_key(case.edit) for case in cases], dtype=torch.int64)


def edit_key(edit: Edit) -> int:
    """What identifies the fact that is asked, in 64 bits."""
    return int.from_bytes(hashlib.sha256(edit.text.strip().encode()).digest()[:8], "big", signed=True)
