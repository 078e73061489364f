"""What the methods share whose trained network changes MLP matrices: KE, MALMEN, MEND, InstructEdit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reknow.layers import resolve_layers
from reknow.learning.editors import open_editor
from reknow.methods.base import Learned

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from reknow.lm import LM


@dataclass(frozen=True, kw_only=True)
class MatrixEditor(Learned):
    """Settings of a method whose network changes the MLP matrices of some layers. No method by itself."""

    layers: tuple[int, ...] | None = None
    """Layers whose MLP matrices are changed; None: the last three. A trained editor brings along its own, like every
    field that shapes its network."""
    seed: int = 0
    """Of the network's first weights."""

    def for_model(self, lm: LM) -> Self:
        last = tuple(range(max(0, lm.layers - 3), lm.layers))
        return replace(self, editor=None, layers=tuple(resolve_layers(lm, self.layers or last)))

    def trained(self, lm: LM) -> tuple[Self, dict[str, Tensor]]:
        """The settings that its editor was trained with, and what that has learned.

        Raises:
            InputError: as in `open_editor`.
        """
        editor = open_editor(self, lm)
        return type(self)(**{**editor.settings, "layers": tuple(editor.settings["layers"])}), editor.tensors


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(MatrixEditor):
    """Settings of MEND's network and of its training, for MEND and InstructEdit. No method by itself."""

    rank: int = 1920
    """Of the network's matrices, at most their width."""
    unit_gradient: bool = False
    """Every token's δ is scaled to length 1 before anything else, as the article on InstructEdit says; the released
    code of neither method does."""
    edits_together: int = 1
    """Edits that are made at once in training."""
    edit_weight: float = 0.1
    """c_e, of the edit loss against the locality loss."""
    step_size: float = 1e-3
    """α at the start, in units of each matrix's root mean square."""
    step_size_rate: float = 1e-4
    """Learning rate of α, in the same unit."""
    learning_rate: float = 1e-6
    """Of Adam, for the network."""
