"""What a method is whose patches leave the weights alone, and what such methods share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from reknow.contract import Method, check_finite, checked, make_patch
from reknow.editing.layers import depth_layer
from reknow.edits import Edit
from reknow.errors import EditRefused, InputError
from reknow.lm import LM
from reknow.patching.memory import versions
from reknow.patching.patches import Patch
from reknow.patching.record import PatchKind
from reknow.texts.writing import normalize


class MemoryMethod(Method):
    """A method whose patches leave the weights alone; see `reknow.patching.memory`."""

    kind: ClassVar[PatchKind]

    @staticmethod
    @abstractmethod
    def memory(lm: LM, patches: Sequence[Patch]) -> Any:
        """The running memory of these versions, oldest first: a Hook-, Prompt- or RouterMemory, as `kind` says.

        Called whenever the stack changes, so it moves tensors and runs no model.
        """


class BesideMatrix(MemoryMethod):
    """A memory beside the value matrix of a layer, or of a few, which its versions share."""

    kind: ClassVar[PatchKind] = "hook"
    depth: ClassVar[float]
    """Of its layer where none is given, as a share."""
    layer: int | None
    conflict: Literal["update", "refuse"]

    def own_layers(self, lm: LM) -> list[int]:
        return [depth_layer(lm, self.depth) if self.layer is None else lm.check_layer(self.layer)]


def conflicts(method: MemoryMethod, lm: LM, edits: Sequence[Edit], wanted: str) -> list[dict[str, str]]:
    """The edits whose prompt the method's memory on `lm` answers in another way, for the notes of the patch.

    Raises:
        InputError, EditRefused: see `settled`.
    """
    edited = [edit for patch in versions(lm.patches, method.name) for edit in patch.edits]
    stored = {normalize(edit.text): edit.target_new for edit in edited}
    found = [
        ({"prompt": edit.text, "old": stored[normalize(edit.text)], "new": edit.target_new}, edit)
        for edit in edits
        if normalize(stored.get(normalize(edit.text), edit.target_new)) != normalize(edit.target_new)
    ]
    return settled(method, found, wanted)


def settled(method: MemoryMethod, clashes: list[tuple[dict[str, str], Edit]], wanted: str) -> list[dict[str, str]]:
    """Stored edits (prompt, old) that get another answer (new), if that is wanted.

    Args:
        clashes: each with the new edit.
        wanted: "update" lets the new edit stand, "refuse" does not.

    Raises:
        InputError: `wanted` is neither.
        EditRefused: it is "refuse" and there are some.
    """
    if wanted not in ("update", "refuse"):
        raise InputError(f"expected conflict to be update or refuse; got {wanted!r}: choose one")
    if clashes and wanted == "refuse":
        told, edit = clashes[0]
        prompt, old, new = (told[key] for key in ("prompt", "old", "new"))
        raise EditRefused(
            f"expected edits that agree with the {method.name} memory; {prompt!r} is stored as {old!r}, got {new!r}: "
            "rebuild without the old edit, or set conflict to update",
            edit,
        )
    return [told for told, _ in clashes]


class Begun(NamedTuple):
    """What an edit of a memory beside a matrix starts from."""

    edits: list[Edit]
    layer: int
    modules: list[str]
    """The value matrices of that layer and of those above."""
    before: list[Patch]
    """The memory's versions so far."""
    notes: dict[str, Any]
    """For the patch: `layer` and `conflicts`."""


def begun(method: BesideMatrix, lm: LM, edits: Sequence[Edit], span: int = 1) -> Begun:
    """The edits checked, the place found, and what is stored there. The memory of the patch must name its `modules`.

    Args:
        span: how many layers take part.

    Raises:
        InputError: see `checked` and `conflicts`; or the memory stands elsewhere.
        EditRefused: see there too.
    """
    edits = checked(method, edits)
    clashes = conflicts(method, lm, edits, method.conflict)
    (layer,) = method.own_layers(lm)
    modules = list(lm.parts.value[layer : layer + span])
    before = versions(lm.patches, method.name)
    if before and (there := before[-1].memory["modules"]) != modules:
        raise InputError(
            f"expected edits of {', '.join(there)}, where the memory is; got {', '.join(modules)}: change layer"
        )
    return Begun(edits, layer, modules, before, {"layer": layer, "conflicts": clashes})


def memory_patch(method: MemoryMethod, lm: LM, edits: Sequence[Edit], state: dict[str, Tensor], **rest) -> Patch:
    """The next version of the method's memory on `lm`: what these edits add; `rest` are `memory` and `notes`.

    Raises:
        EditFailed: a tensor is not finite, so nothing is handed out.
    """
    for name, tensor in state.items():
        check_finite(f"{name} in the memory", tensor)
    state = {name: tensor.cpu() for name, tensor in state.items()}
    before = versions(lm.patches, method.name)
    follows = before[-1].id if before else None
    return make_patch(method, lm, edits, deltas={}, state=state, kind=method.kind, follows=follows, **rest)
