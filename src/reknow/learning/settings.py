"""What the methods share whose trained network changes MLP matrices: KE, MALMEN, MEND, InstructEdit."""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from reknow.checks.bounds import Formerly, Natural, NonNegative, Number, Rank, Rate, Seed
from reknow.contract import check_edits, make_patch
from reknow.editing.layers import resolve_layers
from reknow.edits import Case, Edit
from reknow.errors import InputError
from reknow.learning.editors import open_editor, trained_settings
from reknow.learning.examples import (
    Averaging,
    EditTexts,
    Example,
    ExampleBatch,
    LocalityTokens,
    make_examples,
    possible_texts,
)
from reknow.learning.learned import Learned
from reknow.learning.lower_states import LowerStates
from reknow.learning.training import Split, Training
from reknow.lm import LM
from reknow.patching.deltas import Delta
from reknow.patching.patches import Patch
from reknow.patching.record import Footprint

__all__ = ["Changes", "MatrixEditor", "NetworkSettings", "Tensors"]

_log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
"""What an editor has learned, by name."""
Changes = tuple[dict[str, Delta], float]
"""The change of each matrix, and the mean loss of the answers before."""


@dataclass(frozen=True, kw_only=True)
class MatrixEditor(Learned):
    """Settings of a method whose network changes the MLP matrices of some layers. No method by itself."""

    layers: tuple[int, ...] | None = None
    """Layers whose MLP matrices are changed; None: the last three. A trained editor brings along its own, like every
    field that shapes its network."""
    edit_texts: EditTexts = "both"
    """In training: what must be answered as an edit asks: its prompt, a paraphrase where it has one, or both."""
    locality_facts: Annotated[Natural, Formerly("other_facts")] = 2
    """In training: facts of each case that must stay as they are."""
    locality_tokens: Annotated[LocalityTokens, Formerly("stay_at")] = "answer"
    """In training: which tokens of the facts that must stay count, all of them or those of the answers only, which
    is what locality reads."""
    average_over: Annotated[Averaging, Formerly("mean_over")] = "tokens"
    """In training: what counts alike in the losses, every token or every text, however long it is."""
    seed: Seed = 0
    """Seed of the network's first weights."""

    sums_edits: ClassVar[bool] = True
    """Whether what the edits of a call ask for is added up, and not solved for together."""

    @property
    def edits_in_training(self) -> int:
        """Edits that are made at once in training."""
        return 1

    @abstractmethod
    def transform(self, lm: LM, edits: Sequence[Edit], trained: Self, tensors: Tensors) -> Changes:
        """What the network makes of the edits, by the settings and tensors that `load_trained` gave."""

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = check_edits(self, edits, lm)
        trained, tensors = self.load_trained(lm)
        if self.sums_edits:
            self._warn_of_many(lm, len(edits), trained.edits_in_training)
        with torch.no_grad():
            deltas, loss = self.transform(lm, edits, trained, tensors)
        return make_patch(self, lm, edits, deltas, notes={"layers": list(trained.layers or ()), "loss": loss})

    def _warn_of_many(self, lm: LM, edits: int, known: int) -> None:
        """Once, where those on the stack and these become more than an editor knows."""
        before = sum(len(patch.edits) for patch in lm.patches if patch.method == self.name)
        if before <= known < before + edits:
            _log.warning(
                "%d edits of %s in one model, whose editor was trained on %d at once: it sums what each asks for, "
                "and other text may be lost; look at the perplexity, or take malmen or memit",
                *(before + edits, self.name, known),
            )

    def footprint(self, lm: LM) -> Footprint:
        # Matrices of one shape share a network, so each token meets all networks once for each layer.
        trained, tensors = self.load_trained(lm)
        layers = list(trained.layers or ())
        return Footprint(layers, True, weights_per_token=len(layers) * sum(t.numel() for t in tensors.values()))

    def make_examples(self, batch: Sequence[Case], rng: random.Random, *, edits_at_once: int = 1) -> list[Example]:
        """What the cases are in training."""
        facts, texts = self.locality_facts, self.edit_texts
        return make_examples(batch, rng, edits_at_once=edits_at_once, locality_facts=facts, edit_texts=texts)

    def read_examples(self, lm: LM, examples: Sequence[Example]) -> ExampleBatch:
        """Their texts, by settings that `for_model` gave."""
        assert self.layers is not None
        tokens, over = self.locality_tokens, self.average_over
        return ExampleBatch(lm, examples, min(self.layers), locality_tokens=tokens, average_over=over)

    def lower_states(self, lm: LM, cases: Split, training: Training) -> LowerStates:
        """What enters the lowest layer, by settings that `for_model` gave. Of train cases it is kept where as many
        texts are drawn from them as they have."""
        assert self.layers is not None
        groups = [possible_texts(case) for case in cases.train]
        drawn = training.steps * training.batch_size * training.micro_batches * (3 + self.locality_facts)
        often = groups if drawn >= sum(map(len, groups)) else []
        return LowerStates(lm, min(self.layers), [*often, *(possible_texts(case) for case in cases.validation)])

    def for_model(self, lm: LM) -> Self:
        layers = range(max(0, lm.layers - 3), lm.layers) if self.layers is None else self.layers
        return replace(self, editor=None, layers=tuple(resolve_layers(lm, layers)))

    def load_trained(self, lm: LM) -> tuple[Self, dict[str, Tensor]]:
        """The settings that its editor was trained with, and what that has learned.

        Raises:
            InputError: as in `open_editor`.
        """
        editor = open_editor(self.name, self.editor, lm)
        trained = trained_settings(editor)
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
    """Rank of the network's matrices, at most their width."""
    normalize_gradient: Annotated[bool, Formerly("unit_gradient")] = False
    """Whether every token's gradient δ is scaled to length 1 before anything else, so that a token which the model
    had right weighs as much as one it had wrong: so the article on InstructEdit, not the code of either method."""
    edits_per_example: Annotated[Number, Formerly("edits_together")] = 1
    """In training: edits that are made at once."""
    edit_weight: NonNegative = 0.25
    """c_e: weight of the edit loss against the locality loss."""
    step_size: Rate = 1e-3
    """Step size α at the start, in units of each matrix's root mean square."""
    step_size_learning_rate: Annotated[NonNegative, Formerly("step_size_rate")] = 3e-4
    """Learning rate of the step size α, in units of each matrix's root mean square."""
    learning_rate: Rate = 1e-3
    """Learning rate of Adam for the network."""

    training: ClassVar[Training] = Training(
        steps=2000, batch_size=8, warmup=30, decay=True, clip_norm=100.0, validate_every=200, checkpoint_every=200
    )

    @property
    def edits_in_training(self) -> int:
        return self.edits_per_example
