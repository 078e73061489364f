"""Patch: what an edit changed, as a small file that can be applied, reverted, merged and compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from reknow.checks.arguments import typed
from reknow.errors import InputError, PatchError
from reknow.files.atomic import restore_interrupted
from reknow.files.outputs import HUB
from reknow.patching.deltas import LowRank, factorize, sum_deltas
from reknow.patching.record import PatchRecord, check_weights


class Patch(PatchRecord):
    """What an edit changed, with the state that later edits need; see `PatchRecord` for its fields."""

    @typed
    def save(self, path: str | Path) -> Path:
        """Writes one safetensors file, or for the LoRA family the folder that `peft` loads; an old one stays until
        the new one is whole."""
        from reknow.patching.patch_files import write_patch  # who edits in memory alone needs neither
        from reknow.patching.peft_folder import write_folder

        factored = bool(self.deltas) and all(isinstance(delta, LowRank) for delta in self.deltas.values())
        return write_folder(self, path) if "adapter" in self.notes and factored else write_patch(self, path)

    @classmethod
    @typed
    def load(cls, path: str | Path) -> Patch:
        """Reads what `save` wrote, or a patch that was pushed to the hub (`hub:owner/name[@revision]`).

        Raises:
            PatchError: there is no such file, or it is not a patch.
            InputError: there is no such repository, or it holds no patch.
        """
        from reknow.patching.patch_files import read_patch
        from reknow.patching.peft_folder import is_adapter, read_folder

        if str(path).startswith(HUB):
            from reknow.files.hub import local

            path = local(path)
        restore_interrupted(path)
        record = read_folder(path) if is_adapter(path) else read_patch(path)
        return cls(**{field.name: getattr(record, field.name) for field in fields(record)})

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
        cut = {name: factorize(delta, rank) for name, delta in self.deltas.items() if delta.rank > rank}
        deltas = self.deltas | {name: delta for name, (delta, _) in cut.items()}
        return replace(self, deltas=deltas), max((lost for _, lost in cut.values()), default=0.0)


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
    deltas = {name: sum_deltas([p.deltas[name] for p in patches if name in p.deltas]) for name in names}
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


def merged_away(patch: Patch, what: str) -> InputError:
    """The error for a patch without the state that an edit goes on from, which `merge` leaves behind."""
    return InputError(
        f"expected patches that keep the {what} of their edits; got {patch.label}, which was merged: apply the "
        "patches that it was merged from"
    )


@typed
def diff(a: Patch, b: Patch) -> dict:
    """How two patches compare: edits in one or both, and per matrix the norms and the cosine between the changes.

    Raises:
        PatchError: one of them is a memory.
    """
    check_weights([a, b], "compare")
    matrices = {}
    for name in sorted(set(a.deltas) | set(b.deltas)):
        first, second = a.deltas.get(name), b.deltas.get(name)
        norms = [0.0 if delta is None else delta.norm() for delta in (first, second)]
        cosine = None
        if first is not None and second is not None and all(norms) and first.shape == second.shape:
            cosine = float((first.dense() * second.dense()).sum()) / (norms[0] * norms[1])
        matrices[name] = {"norm_a": norms[0], "norm_b": norms[1], "cosine": cosine}
    of_a, of_b = set(a.edits), set(b.edits)
    return {
        "same_base": a.base.difference(b.base) is None,
        "edits_only_a": [edit for edit in a.edits if edit not in of_b],
        "edits_only_b": [edit for edit in b.edits if edit not in of_a],
        "edits_both": [edit for edit in a.edits if edit in of_b],
        "matrices": matrices,
    }
