"""What a method is whose patches leave the weights alone, and the steps that its edits go through.

    prepare         checks the edits and finds the place, the versions stored there, and conflicts with them
    train_beside    learns what hooks add to the model until it gives the answers
    memory_patch    makes what was learned the next version of the memory, and notes conflicts if nobody has

Settings that the memories beside a matrix share stand here too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from reknow.checks.bounds import NonNegative, Number, Seed, current_names, field_types
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.descent import Update, descend
from reknow.editing.papers_layers import depth_layer
from reknow.edits import Edit
from reknow.errors import EditRefused, InputError
from reknow.lm import LM
from reknow.model.scored_tokens import AnswerLoss
from reknow.model.tokens import EncodedText
from reknow.patching.memory import HookMemory, versions
from reknow.patching.patches import Patch
from reknow.patching.record import Footprint, PatchKind
from reknow.texts.writing import normalize

__all__ = ["MemoryMethod", "SideModuleMethod", "begin", "conflicts", "memory_patch", "paraphrases", "prepare"]
__all__ += ["resolve_conflicts", "train_beside"]


@dataclass(frozen=True, kw_only=True)
class MemoryMethod(Method):
    """A method whose patches leave the weights alone; see `reknow.patching.memory`."""

    kind: ClassVar[PatchKind]
    for_all: ClassVar[tuple[str, ...]] = ()
    """Fields that hold for all edits of a memory, those that the method has."""

    conflict: Literal["update", "refuse"] = "update"
    """What happens to an edit that gives a stored prompt another answer: `update` replaces the stored edit and notes
    both in the patch, `refuse` raises an error."""

    @staticmethod
    @abstractmethod
    def running_memory(lm: LM, patches: Sequence[Patch]) -> Any:
        """The running memory of these versions, oldest first: a Hook-, Prompt- or RouterMemory, as `kind` says.

        Called whenever the stack changes, so it moves tensors and runs no model.
        """


@dataclass(frozen=True)
class SideModuleMethod(MemoryMethod):
    """A memory beside a matrix of a layer's MLP, or of a few, which its versions share."""

    kind: ClassVar[PatchKind] = "hook"
    depth: ClassVar[float]
    """The papers' layer as a share of the depth."""
    for_all = ("units",)

    layer: int | None = None
    """Layer beside whose matrix the memory stands; None: at the share of the depth where the papers put it."""
    steps: Number = 100
    """Updates at most of what is trained together: an edit, a block of edits, or all edits of a call."""
    stop_loss: NonNegative = 0.05
    """What is trained is finished when its whole loss (nats a token) is below; 0: all steps, as in the papers."""
    seed: Seed = 0
    """Seed of all that is drawn at random."""

    def chosen_layer(self, lm: LM) -> int:
        """The layer that is given, or else that at `depth`."""
        return depth_layer(lm, self.depth) if self.layer is None else lm.check_layer(self.layer)

    def modules(self, lm: LM, layer: int) -> list[str]:
        """The matrices beside which it stands, the lowest first: the layer's value matrix."""
        return [lm.parts.value[layer]]

    def footprint(self, lm: LM) -> Footprint:
        return Footprint([self.chosen_layer(lm)])


class _Prepared(NamedTuple):
    """What an edit of a memory beside a matrix starts from."""

    edits: list[Edit]
    layer: int
    modules: list[str]
    """The matrices beside which the memory stands."""
    versions: list[Patch]
    """The memory so far, oldest first."""
    notes: dict[str, Any]
    """For the patch: `layer` and `conflicts`."""


def prepare(method: SideModuleMethod, lm: LM, edits: Sequence[Edit]) -> _Prepared:
    """The edits checked, the place found, and what is stored there. A memory that names its `modules` has one place.

    Raises:
        InputError: no edits, or a layer that the model lacks; or the memory stands elsewhere, or was begun with
            another value of a field that holds for all of it.
        EditRefused: see `check_edits` and `resolve_conflicts`.
    """
    edits, stored, notes = begin(method, lm, edits)
    layer = method.chosen_layer(lm)
    modules = method.modules(lm, layer)
    if stored and (there := stored[-1].memory.get("modules", modules)) != modules:
        own = " or ".join(name for name in ("layer", "site", "span") if name in field_types(type(method)))
        raise InputError(
            f"expected edits of {', '.join(there)}, where the memory is; got {', '.join(modules)}: change {own}"
        )
    return _Prepared(edits, layer, modules, stored, {"layer": layer, **notes})


def begin(method: MemoryMethod, lm: LM, edits: Sequence[Edit]) -> tuple[list[Edit], list[Patch], dict[str, Any]]:
    """(the edits checked, the memory so far, oldest first, `conflicts` for the notes of the patch).

    Raises:
        InputError: no edits, or the memory was begun with another value of a field that holds for all of it.
        EditRefused: see `check_edits` and `resolve_conflicts`.
    """
    edits, kind = check_edits(method, edits, lm), type(method)
    stored = versions(lm.patches, method.name)
    begun = current_names(kind, stored[-1].settings) if stored else {}
    for name in sorted(set(method.for_all) & set(field_types(kind))) if stored else ():
        value, wanted = getattr(method, name), begun.get(name, getattr(kind, name))
        if name in stored[-1].memory:  # which has what was left open in the settings
            wanted = stored[-1].memory[name]
            value = wanted if value is None else value
        if value != wanted:
            raise InputError(
                f"expected the {name} that the memory was begun with; got {value}: set it to {wanted}, or take the "
                "memory off first"
            )
    return edits, stored, {"conflicts": resolve_conflicts(method, conflicts(method, lm, edits))}


def conflicts(method: MemoryMethod, lm: LM, edits: Sequence[Edit]) -> list[tuple[Edit, Edit]]:
    """(stored edit, new edit) where the method's memory on `lm` holds another answer to the same prompt."""
    stored = {normalize(edit.text): edit for patch in versions(lm.patches, method.name) for edit in patch.edits}
    pairs = [(stored.get(normalize(edit.text), edit), edit) for edit in edits]
    return [(old, new) for old, new in pairs if normalize(old.target_new) != normalize(new.target_new)]


def resolve_conflicts(method: MemoryMethod, pairs: Sequence[tuple[Edit, Edit]]) -> list[dict[str, str]]:
    """For the notes of the patch: what becomes of these stored edits as `method.conflict` says; see `conflicts`.

    Raises:
        EditRefused: it says "refuse", and there are some.
    """
    if pairs and method.conflict == "refuse":
        old, new = pairs[0]
        raise EditRefused(
            f"expected edits that agree with the {method.name} memory; {old.text!r} is stored as {old.target_new!r}, "
            f"got {new.target_new!r}: rebuild without the old edit, or set conflict to update",
            new,
        )
    return [{"prompt": old.text, "old": old.target_new, "new": new.target_new} for old, new in pairs]


def train_beside(
    method: SideModuleMethod,
    lm: LM,
    hooks: HookMemory,
    rows: Sequence[EncodedText],
    layer: int,
    update: Update,
    finished: Callable[[Tensor], Tensor],
    loss: Callable[[AnswerLoss], Tensor] = AnswerLoss.nll,
) -> list[list]:
    """Descends on what `hooks` add to the model until its answers are learned; gives every pass's losses.

    Args:
        hooks: the method's memory meanwhile.
        rows: encoded prompts with their answers.
        layer: the lowest that the hooks change.
        update, finished: see `reknow.editing.descent.descend`.
        loss: of the edits, read off their answers. (edits,) or (edits, terms)
    """
    with lm.temporary_memory(method.name, hooks), torch.enable_grad():
        answers = AnswerLoss(lm, rows, layer)
        return descend([lambda: loss(answers)], update, method.steps, finished)


def paraphrases(edit: Edit) -> list[str]:
    """The edit's prompt and its paraphrases, the subject filled in."""
    return [edit.text, *map(edit.fill, edit.rephrasings)]


def memory_patch(
    method: MemoryMethod,
    lm: LM,
    edits: Sequence[Edit],
    state: dict[str, Tensor],
    *,
    memory: dict[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> Patch:
    """The next version of the method's memory on `lm`: what these edits add.

    Args:
        state: the version's tensors.
        memory: what it knows besides, as JSON values: its `VersionFields`.
        notes: what its maker tells about it; `conflicts` are found here where a method has not found them before.

    Raises:
        EditFailed: a tensor is not finite, so nothing is handed out.
        EditRefused: see `resolve_conflicts`.
    """
    notes = notes or {}
    if "conflicts" not in notes:
        notes = {"conflicts": resolve_conflicts(method, conflicts(method, lm, edits)), **notes}
    state = {name: tensor.cpu() for name, tensor in state.items()}
    stored = versions(lm.patches, method.name)
    about = {
        "kind": method.kind,
        "follows": stored[-1].id if stored else None,
        "memory": memory or {},
        "notes": notes,
    }
    return make_patch(method, lm, edits, deltas={}, state=state, **about)
