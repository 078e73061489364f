"""What the methods share whose trained network changes MLP matrices: KE, MALMEN, MEND, InstructEdit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from reknow.checks.bounds import Formerly, Natural, Number, Rank, Rate, Seed, Weight
from reknow.contract import Footprint
from reknow.editing.layers import resolve_layers
from reknow.edits import Case
from reknow.errors import InputError
from reknow.learning.editors import open_editor, trained_settings
from reknow.learning.examples import Exam, Lesson, MeanOver, StayAt, lessons
from reknow.learning.learned import Learned
from reknow.learning.training import Training

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
    locality_facts: Annotated[Natural, Formerly("other_facts")] = 2
    """Facts of each case that must stay, in training."""
    locality_tokens: Annotated[StayAt, Formerly("stay_at")] = "answer"
    """Which of their tokens must stay: all, or those of the answers only, which is what locality reads."""
    average_over: Annotated[MeanOver, Formerly("mean_over")] = "tokens"
    """What counts alike in the losses: every token, or every text, however long it is."""
    seed: Seed = 0
    """Of the network's first weights."""

    def footprint(self, lm: LM) -> Footprint:
        # Matrices of one shape share a network, so each token meets all networks once for each layer.
        trained, tensors = self.trained(lm)
        layers = list(trained.layers or ())
        return Footprint(layers, True, weights_per_token=len(layers) * sum(t.numel() for t in tensors.values()))

    def lessons(self, batch: Sequence[Case], rng: random.Random, *, together: int = 1) -> list[Lesson]:
        """What is to be learned from the cases."""
        return lessons(batch, rng, together=together, locality_facts=self.locality_facts)

    def exam(self, lm: LM, found: Sequence[Lesson]) -> Exam:
        """Their texts, of settings that `for_model` gave."""
        assert self.layers is not None
        return Exam(lm, found, min(self.layers), locality_tokens=self.locality_tokens, average_over=self.average_over)

    def for_model(self, lm: LM) -> Self:
        layers = range(max(0, lm.layers - 3), lm.layers) if self.layers is None else self.layers
        return replace(self, editor=None, layers=tuple(resolve_layers(lm, layers)))

    def trained(self, lm: LM) -> tuple[Self, dict[str, Tensor]]:
        """The settings that its editor was trained with, and what that has learned.

        Raises:
            InputError: as in `open_editor`.
        """
        editor = open_editor(self.name, self.editor, lm)
        trained = trained_settings(type(self), editor)
        if trained.layers is None:
            raise InputError(
                f"expected an editor that names its layers; got one of {editor.method} without: train another with "
                f"`reknow train {editor.method}`"
            )
        return replace(trained, layers=tuple(resolve_layers(lm, trained.layers))), editor.tensors


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(MatrixEditor):
    """Settings of MEND's network and of its training, for MEND and InstructEdit. No method by itself."""

    rank: Rank = 1920
    """Of the network's matrices, at most their width."""
    normalize_gradient: Annotated[bool, Formerly("unit_gradient")] = False
    """Every token's δ is scaled to length 1 before anything else, as the article on InstructEdit says; the released
    code of neither method does."""
    edits_per_example: Annotated[Number, Formerly("edits_together")] = 1
    """Edits that are made at once in training."""
    edit_weight: Weight = 0.25
    """c_e, of the edit loss against the locality loss."""
    step_size: Rate = 1e-2
    """α at the start, in units of each matrix's root mean square."""
    step_size_learning_rate: Annotated[Weight, Formerly("step_size_rate")] = 3e-4
    """Learning rate of α, in the same unit."""
    learning_rate: Rate = 1e-3
    """Of Adam, for the network."""

    training: ClassVar[Training] = Training(
        steps=2000, batch_size=8, warmup=30, decay=True, clip_norm=100.0, validate_every=200, checkpoint_every=200
    )
