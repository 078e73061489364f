"""The patches that are applied to a model: the change from some to others is whole, or not made."""

from __future__ import annotations

from contextlib import contextmanager

from reknow.model.exclusive import undo_on_exit
from reknow.patching.active_memories import ActiveMemories
from reknow.patching.patches import Patch
from reknow.patching.weights import Weights


class Applied:
    """The patches that the weights and memories of a model show, in order.

    Attributes:
        patches: what is applied. However a change ends, by an error or by an interrupt, the model is what this says.
    """

    def __init__(self, weights: Weights, memories: ActiveMemories):
        self.patches: tuple[Patch, ...] = ()
        self._weights, self._memories = weights, memories
        self._shown: tuple[Patch, ...] | None = ()
        """What the model is; None while it is changed."""

    def set(self, patches: tuple[Patch, ...]) -> None:
        """Applies exactly these patches, or changes nothing; raises PatchError where one does not fit the model."""
        with undo_on_exit(self._settle):
            self._show(patches)
            self.patches = patches

    @contextmanager
    def kept(self):
        """While open, other patches may be applied; afterwards those from before are."""
        before = self.patches
        with undo_on_exit(lambda: self.set(before)):
            yield

    def _settle(self) -> None:
        if self._shown is not self.patches:
            self._show(self.patches)

    def _show(self, patches: tuple[Patch, ...]) -> None:
        self._shown = None
        self._weights.set(patches)
        self._memories.set(patches)
        self._shown = patches
