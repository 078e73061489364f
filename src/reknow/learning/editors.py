"""Editor: what a method that learns to edit has learned for one model, as a file that can be shared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import reknow
from reknow.edits import Case, Edit
from reknow.errors import InputError
from reknow.files import write_aside
from reknow.fingerprint import Fingerprint

if TYPE_CHECKING:
    from reknow.lm import LM
    from reknow.methods.base import Learned, Method

FORMAT = 1
EDITOR_FILE = "editor.safetensors"
"""What an editor is called in the folder where it was trained."""


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
    """Of the library that trained it."""

    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, whose header carries the rest as JSON; an old file stays until it is whole."""
        header = {
            "format": FORMAT,
            "kind": "editor",
            "method": self.method,
            "settings": self.settings,
            "notes": self.notes,
            "version": self.version,
            "base": {"structure": self.base.structure, "tokenizer": self.base.tokenizer, "dtype": self.base.dtype},
        }
        tensors = {"base.samples": self.base.samples, "seen": self.seen}
        # Cloned, because safetensors refuses tensors that share memory, such as tied embeddings.
        tensors |= {f"editor.{name}": t.detach().cpu().contiguous().clone() for name, t in self.tensors.items()}
        return write_aside(path, lambda aside: save_file(tensors, aside, metadata={"reknow": json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path) -> Editor:
        """Reads an editor file, or the one in the folder where it was trained.

        Raises:
            InputError: there is no such file, or it is not an editor.
        """
        path = Path(path) / EDITOR_FILE if Path(path).is_dir() else Path(path)
        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {})["reknow"])
                if header["kind"] != "editor":
                    raise ValueError(f"its kind is {header['kind']}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            if header["format"] > FORMAT:
                raise ValueError(f"its format is {header['format']}, which needs a newer reknow")
            return cls(
                method=header["method"],
                settings=header["settings"],
                tensors={n.removeprefix("editor."): t for n, t in tensors.items() if n.startswith("editor.")},
                base=Fingerprint(**header["base"], samples=tensors["base.samples"]),
                seen=tensors["seen"],
                notes=header["notes"],
                version=header["version"],
            )
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"it is none ({error})"
            raise InputError(
                f"expected a trained editor at {path}; {reason}: give a file that `reknow train` wrote"
            ) from error

    def halved(self) -> Editor:
        """The editor with its matrices in float16, which is half as large; it computes in float32 all the same.

        Vectors stay: sums of squares among them are too large for float16.
        """
        small = {name: t.half() if t.is_floating_point() and t.dim() > 1 else t for name, t in self.tensors.items()}
        return replace(self, tensors=small)


def open_editor(method: Learned, lm: LM) -> Editor:
    """The trained editor of a method, on the model's device, in float32: from its file, or the bundled one.

    Raises:
        InputError: none is given and none is bundled for this model; or it is of another method or model.
    """
    if method.editor is None:
        editor, where = _bundled(method, lm), "the bundled editor"
    else:
        editor, where = Editor.load(method.editor), str(method.editor)
    if editor.method != method.name:
        raise InputError(
            f"expected an editor for {method.name}; {where} is one for {editor.method}: give another, or use "
            f"{editor.method}"
        )
    if problem := editor.base.difference(lm.fingerprint):
        raise InputError(
            f"expected an editor that was trained for {lm.name}; {where} belongs to a model with {problem}: "
            f"train one with `reknow train {method.name} --model {lm.name}`"
        )
    tensors = {
        n: t.to(lm.device, torch.float32 if t.is_floating_point() else None) for n, t in editor.tensors.items()
    }
    return replace(editor, tensors=tensors)


def _bundled(method: Learned, lm: LM) -> Editor:
    """The editor of this method for this very model that comes with the library."""
    folder = files("reknow") / "assets" / "editors"
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name.startswith(f"{method.name}-") and name.endswith(".safetensors"):
            with as_file(folder / name) as path:
                editor = Editor.load(path)
            if editor.base.difference(lm.fingerprint) is None:
                return editor
    raise InputError(
        f"{method.name} learns to edit and needs an editor trained for {lm.name}; none is given and none is bundled: "
        f"train one with `reknow train {method.name} --model {lm.name} --data … --out FOLDER` and set editor=FOLDER"
    )


def case_keys(cases: Iterable[Case]) -> Tensor:
    """What identifies the facts that are asked, whatever file they come from. (cases,) int64"""
    return torch.tensor([_key(case.edit) for case in cases], dtype=torch.int64)


def _key(edit: Edit) -> int:
    return int.from_bytes(hashlib.sha256(edit.text.strip().encode()).digest()[:8], "big", signed=True)


def refuse_seen(method: Method, lm: LM, cases: Sequence[Case]) -> None:
    """Raises InputError where a method's editor was trained on one of the cases, whose scores would mean nothing."""
    from reknow.methods.base import Learned

    if not isinstance(method, Learned):
        return
    seen = set(open_editor(method, lm).seen.tolist())
    known = [case.edit for case in cases if _key(case.edit) in seen]
    if known:
        raise InputError(
            f"expected cases on which the editor of {method.name} was not trained; it was on {len(known)} of "
            f"{len(cases)}, such as {known[0].id or known[0].text!r}: evaluate on others, or train on others"
        )
