"""MEND: Fast Model Editing at Scale. Mitchell, Lin, Bosselut, Finn, Manning 2021, arXiv 2110.11309.

The gradient of an edit's loss is a poor edit, but a network can learn to turn it into a good one. It is never formed:
the network reads its factors, one input u and one output gradient δ per token, and gives others.

    z = [norm(u); norm(δ)]                         norm: by statistics that run along in training
    h = z + relu(s₁ ⊙ (U₁V₁z + b₁) + o₁),  [ũ; δ̃] = h + relu(s₂ ⊙ (U₂V₂h + b₂) + o₂)
    W ← W − α Σ_tokens δ̃ ũᵀ                        trained on c_e · L_edit + L_loc                     (§3, Alg. 1)

Matrices of one shape share the network; s, o and the step size α are each matrix's own. L_edit: NLL of the answer on
the edit's prompt and on a paraphrase; L_loc: KL between the model before and after on other facts. The network and
its training step are in `reknow.learning.gradient_network`, since InstructEdit has the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import Self

from reknow.edits import Edit
from reknow.learning.examples import without_instructions
from reknow.learning.gradient_network import TransformLearner, transform_gradients
from reknow.learning.settings import Changes, NetworkSettings, Tensors
from reknow.learning.training import Learner, Split, Training
from reknow.lm import LM
from reknow.model.tokens import Text


@dataclass(frozen=True)
class MEND(NetworkSettings):
    """A network, trained once for a model, that turns an edit's gradient into a change of the weights."""

    @property
    def name(self) -> str:
        return "mend"

    def learner(self, lm: LM, cases: Split, training: Training) -> Learner:
        return TransformLearner(self, lm, cases, training, lambda batch, _: without_instructions(batch))

    def transform(self, lm: LM, edits: Sequence[Edit], trained: Self, tensors: Tensors) -> Changes:
        return transform_gradients(lm, trained, tensors, [Text.asked(edit) for edit in edits])
