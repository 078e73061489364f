"""Patch: what an edit changed, as a small file that can be applied, reverted, merged and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from reknow.checks.arguments import typed
from reknow.edits import Edit, to_json
from reknow.errors import InputError, PatchError
from reknow.files.atomic import restore_interrupted
from reknow.model.exact import exact
from reknow.model.fingerprint import Fingerprint

FORMAT = 1

Kind = Literal["weights", "hook", "prompt", "router"]
"""What a patch acts on: the weights; or, a memory, what modules compute, what is asked, or who answers."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix as a product: `left @ right`, of shape (out, in)."""

    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself, in float64. (out, in)"""
        return exact(self.left) @ exact(self.right)

    def norm(self) -> float:
        """Frobenius norm, without forming the matrix."""
        left, right = exact(self.left), exact(self.right)
        gram = (left.T @ left) * (right @ right.T)
        return float(gram.sum().clamp(min=0).sqrt())


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix as itself, of shape (out, in)."""

    matrix: Tensor  # (out, in)

    @property
    def rank(self) -> int:
        return min(self.matrix.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself, in float64. (out, in)"""
        return exact(self.matrix)

    def norm(self) -> float:
        """Frobenius norm."""
        return float(exact(self.matrix).norm())


Delta = LowRank | Dense
"""A change ΔW of one matrix; always seen as (out, in), whatever way round the model stores it."""


@dataclass(frozen=True, eq=False)
class Patch:
    """What an edit changed, with the state that later edits need."""

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
    kind: Kind = "weights"
    """Where it is not "weights", the patch is one version of a memory: what its edits added."""
    follows: str | None = None
    """Of a memory: the id of the version before, which must be applied."""
    memory: dict = field(default_factory=dict)
    """What a memory knows besides tensors: labels, texts, the layer. JSON values."""
    notes: dict = field(default_factory=dict)
    """What happened on the way: losses, seconds, layer. JSON values."""
    version: str = ""
    """Of the library that made it."""

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits of the content; notes and version do not count, so that equal edits are equal."""
        content = {key: value for key, value in self._header().items() if key not in ("notes", "version")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    @property
    def label(self) -> str:
        """How messages name it."""
        about = self.edits[0].subject or self.edits[0].text if self.edits else "no edit"
        more = f" and {len(self.edits) - 1} more" if len(self.edits) > 1 else ""
        return f"patch {self.id} ({self.method}: {about}{more})"

    def _header(self) -> dict:
        header = {
            "format": FORMAT,
            "kind": self.kind,
            "method": self.method,
            "settings": self.settings,
            "edits": [to_json(edit) for edit in self.edits],
            "made_on": list(self.made_on),
            "notes": self.notes,
            "version": self.version,
            "base": {
                "structure": self.base.structure,
                "tokenizer": self.base.tokenizer,
                "dtype": self.base.dtype,
            },
        }
        return header if self.kind == "weights" else {**header, "follows": self.follows, "memory": self.memory}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"base.samples": self.base.samples}
        for name, delta in self.deltas.items():
            parts = (
                {"left": delta.left, "right": delta.right} if isinstance(delta, LowRank) else {"dense": delta.matrix}
            )
            tensors |= {f"delta.{name}.{part}": tensor for part, tensor in parts.items()}
        tensors |= {f"state.{name}": tensor for name, tensor in self.state.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @typed
    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, or for the LoRA family the folder that `peft` loads; an old one stays until
        the new one is whole."""
        from reknow.patching.patch_files import write_patch  # files know patches
        from reknow.patching.peft_folder import save

        return save(self, path) if "adapter" in self.notes else write_patch(self, path)

    @classmethod
    @typed
    def load(cls, path: str | Path) -> Patch:
        """Reads what `save` wrote.

        Raises:
            PatchError: there is no such file, or it is not a patch.
        """
        from reknow.patching.patch_files import read_patch  # files know patches
        from reknow.patching.peft_folder import is_adapter, load

        restore_interrupted(path)
        return load(path) if Path(path).is_dir() and is_adapter(path) else read_patch(path)

    @typed
    def truncated(self, rank: int) -> tuple[Patch, float]:
        """The patch with every ΔW cut to `rank` by SVD, and the relative Frobenius error of the worst matrix.

        Raises:
            InputError: the rank is below 1.
            PatchError: the patch is a memory.
        """
        check_weights([self], "cut to a rank")
        if rank < 1:
            raise InputError(f"expected a rank of at least 1; got {rank}: raise it")
        deltas, worst = {}, 0.0
        for name, delta in self.deltas.items():
            if delta.rank <= rank:
                deltas[name] = delta
                continue
            deltas[name], lost = factored(delta, rank)
            worst = max(worst, lost)
        return replace(self, deltas=deltas), worst


def factored(delta: Delta, limit: int) -> tuple[LowRank, float]:
    """The change as factors of rank `limit` at most, and the share of its Frobenius norm that is lost."""
    if isinstance(delta, LowRank) and delta.rank <= limit:
        return LowRank(delta.left.float(), delta.right.float()), 0.0
    u, s, vh = torch.linalg.svd(delta.dense(), full_matrices=False)
    # What float32 cannot tell from zero is no rank.
    rank = min(limit, int((s > s[0] * 1e-7).sum().clamp(min=1)))
    root = s[:rank].sqrt()
    lost = float(s[rank:].norm() / s.norm().clamp(min=1e-300))
    return LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()), lost


@typed
def merge(patches: Sequence[Patch]) -> Patch:
    """One patch that changes the weights as all of them together, in any order; their `state` is left behind.

    Raises:
        PatchError: nothing to merge, a memory, or patches of different base models.
    """
    if not patches:
        raise PatchError("expected at least one patch to merge; got none: name the files")
    check_weights(patches, "merge")
    head = patches[0]
    for patch in patches[1:]:
        head.base.check(patch.base, head.label)
    names = dict.fromkeys(name for patch in patches for name in patch.deltas)
    deltas = {name: summed([p.deltas[name] for p in patches if name in p.deltas]) for name in names}
    merged = {patch.id for patch in patches}
    return Patch(
        method=head.method if len({p.method for p in patches}) == 1 else "merged",
        settings=head.settings if all(p.settings == head.settings for p in patches) else {},
        edits=tuple(edit for patch in patches for edit in patch.edits),
        deltas=deltas,
        base=head.base,
        made_on=tuple(dict.fromkeys(i for p in patches for i in p.made_on if i not in merged)),
        notes={"merged": [patch.id for patch in patches]},
        version=head.version,
    )


def check_weights(patches: Sequence[Patch], purpose: str) -> None:
    """Raises PatchError where one of the patches is a memory, which has no matrices to `purpose`."""
    for patch in patches:
        if patch.kind != "weights":
            raise PatchError(
                f"expected changes of weights to {purpose}; {patch.label} is a memory beside the model: "
                "keep it in a stack folder, which LM opens"
            )


def total(base: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """base + Σ ΔW in base's dtype and on its device; the factors of all low-rank changes in one product. (out, in)"""
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if factors:
        left, right = _side_by_side(factors)
        base = torch.addmm(base, left.to(base), right.to(base))
    for delta in deltas:
        if isinstance(delta, Dense):
            base = base + delta.matrix.to(base)
    return base


def _side_by_side(factors: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    return torch.cat([d.left for d in factors], 1), torch.cat([d.right for d in factors], 0)


def summed(deltas: Sequence[Delta]) -> Delta:
    """Σ ΔW: factors side by side while that is smaller than the matrix itself."""
    out, inside = deltas[0].shape
    factors = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) == len(deltas) and sum(d.rank for d in factors) * (out + inside) < out * inside:
        return LowRank(*_side_by_side(factors))
    return Dense(total(torch.zeros(out, inside, dtype=torch.float64), deltas).float())


@typed
def diff(a: Patch, b: Patch) -> dict:
    """How two patches compare: edits in one or both, and per matrix the norms and the cosine between the changes.

    Raises:
        PatchError: one of them is a memory.
    """
    check_weights([a, b], "compare")
    matrices = {}
    for name in sorted(set(a.deltas) | set(b.deltas)):
        row = {"norm_a": 0.0, "norm_b": 0.0, "cosine": None}
        if name in a.deltas:
            row["norm_a"] = a.deltas[name].norm()
        if name in b.deltas:
            row["norm_b"] = b.deltas[name].norm()
        if row["norm_a"] and row["norm_b"] and a.deltas[name].shape == b.deltas[name].shape:
            row["cosine"] = float((a.deltas[name].dense() * b.deltas[name].dense()).sum()) / (
                row["norm_a"] * row["norm_b"]
            )
        matrices[name] = row
    first, second = set(a.edits), set(b.edits)
    return {
        "same_base": a.base.difference(b.base) is None,
        "edits_only_a": [e for e in a.edits if e not in second],
        "edits_only_b": [e for e in b.edits if e not in first],
        "edits_both": [e for e in a.edits if e in second],
        "matrices": matrices,
    }
