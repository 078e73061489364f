"""What a patch is made of: the plain record that patch files hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reknow.edits import Edit, to_json
from reknow.errors import PatchError
from reknow.files.strict_json import finite
from reknow.model.fingerprint import Fingerprint
from reknow.patching.deltas import Delta, delta_tensors

FORMAT = 1

PatchKind = Literal["weights", "hook", "prompt", "router"]
"""What a patch acts on: the weights; or, a memory, what modules compute, what is asked, or who answers."""


class Footprint(NamedTuple):
    """Where a patch will act and what making it multiplies, by which its cost is estimated."""

    layers: list[int]
    takes_gradient: bool = False
    """The method takes the edits' gradient once and transforms it."""
    weights_per_token: int = 0
    """Weights of its own by which each token is multiplied in doing so."""
    weights_per_edit: int = 0
    """Weights of its own by which each edit is multiplied."""


@dataclass(frozen=True, eq=False)
class PatchRecord:
    """What an edit changed, with the state that later edits need. Patches of the same `id` are equal."""

    method: str
    """Name in the table of methods."""
    settings: dict
    """The method's fields, as JSON values."""
    edits: tuple[Edit, ...]
    deltas: dict[str, Delta]
    """ΔW by matrix name."""
    base: Fingerprint
    made_on: tuple[str, ...] = ()
    """Ids of the patches that were applied when this one was made."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What later edits need; all tensors of a memory."""
    kind: PatchKind = "weights"
    """Where it is not "weights", the patch is one version of a memory: what its edits added."""
    follows: str | None = None
    """Id of the version of the memory before this one, which must be applied."""
    memory: dict = field(default_factory=dict)
    """What a memory knows besides tensors: labels, texts, the layer. JSON values."""
    notes: dict = field(default_factory=dict)
    """What happened on the way: losses, seconds, layer. JSON values."""
    version: str = ""
    """Release of the library that made the patch."""

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits of the content; notes and version do not count, so that equal edits are equal."""
        content = {key: value for key, value in self.header().items() if key not in ("notes", "version")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, PatchRecord) and self.id == other.id)

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def label(self) -> str:
        """How messages name it."""
        about = self.edits[0].subject or self.edits[0].text if self.edits else "no edit"
        more = f" and {len(self.edits) - 1} more" if len(self.edits) > 1 else ""
        return f"patch {self.id} ({self.method}: {about}{more})"

    def header(self) -> dict:
        """What is no tensor, as JSON values."""
        base = {"structure": self.base.structure, "tokenizer": self.base.tokenizer, "dtype": self.base.dtype}
        header = {
            "format": FORMAT,
            "kind": self.kind,
            "method": self.method,
            "settings": self.settings,
            "edits": [to_json(edit) for edit in self.edits],
            "made_on": list(self.made_on),
            "notes": finite(self.notes),  # a loss may have been no number
            "version": self.version,
            "base": base,
        }
        return header if self.kind == "weights" else {**header, "follows": self.follows, "memory": self.memory}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, on the CPU, by the names that they have in a file."""
        state = {f"state.{name}": tensor for name, tensor in self.state.items()}
        tensors = {"base.samples": self.base.samples, **delta_tensors(self.deltas), **state}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @property
    def stored_bytes(self) -> int:
        """What the change itself takes in a file: ΔW, the state, what a memory knows; not the record around them."""
        tensors = (*delta_tensors(self.deltas).values(), *self.state.values())
        memory = len(json.dumps(self.memory).encode()) if self.memory else 0
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + memory


def check_weights(patches: Sequence[PatchRecord], purpose: str) -> None:
    """Raises PatchError where one of the patches is a memory, which has no matrices to `purpose`."""
    for patch in patches:
        if patch.kind != "weights":
            raise PatchError(
                f"expected changes of weights to {purpose}; {patch.label} is a memory beside the model: "
                "keep it in a stack folder, which LM opens"
            )
