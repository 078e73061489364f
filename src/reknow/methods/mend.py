"""MEND: Fast Model Editing at Scale. Mitchell, Lin, Bosselut, Finn, Manning 2021, arXiv 2110.11309.

The gradient of an edit's loss is a poor edit, but a network can learn to turn it into a good one. It is never formed:
the network reads its factors, one input u and one output gradient δ per token, and gives others.

    z = [norm(u); norm(δ)]                         norm: by statistics that run along in training
    h = z + relu(s₁ ⊙ (U₁V₁z + b₁) + o₁),  [ũ; δ̃] = h + relu(s₂ ⊙ (U₂V₂h + b₂) + o₂)
    W ← W − α Σ_tokens δ̃ ũᵀ                        trained on c_e · L_edit + L_loc                     (§3, Alg. 1)

Matrices of one shape share the network; s, o and the step size α are each matrix's own. L_edit: NLL of the answer on
the edit's prompt and on a rewording; L_loc: KL between the model before and after on other facts. The network and its
training step are in `reknow.learning.transform`, since InstructEdit has the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from reknow.edits import Case, Edit
from reknow.learning.editors import open_editor
from reknow.learning.lessons import bare
from reknow.learning.training import Training, split, train
from reknow.learning.transform import TransformLearner, last_layers, transformed
from reknow.methods.base import Learned, checked, weights_patch
from reknow.patches import Patch
from reknow.tokens import Text

if TYPE_CHECKING:
    from reknow.lm import LM


@dataclass(frozen=True)
class MEND(Learned):
    """A network, trained once for a model, that turns an edit's gradient into a change of the weights."""

    editor: str | None = None
    """File or folder of the trained editor; None: the one that is bundled for the model. The editor brings along the
    layers, rank and `unit_gradient` with which it was trained."""
    layers: tuple[int, ...] | None = None
    """Layers whose MLP matrices are changed; None: the last three."""
    rank: int = 1920
    """Of the network's matrices, at most their width."""
    unit_gradient: bool = False
    """Every token's δ is scaled to length 1 before anything else."""
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
    seed: int = 0
    """Of the network's first weights."""

    training: ClassVar[Training] = Training(
        steps=4000, batch_size=8, clip_norm=100.0, validate_every=250, checkpoint_every=250
    )

    @property
    def name(self) -> str:
        return "mend"

    def fit(
        self,
        lm: LM,
        cases: Sequence[Case],
        out: str | Path,
        training: Training | None = None,
        *,
        progress: bool = False,
    ) -> MEND:
        training = training or self.training
        learning, held = split(cases, training)
        method = replace(self, editor=None, layers=last_layers(lm, self.layers))
        learner = TransformLearner(method, lm, training.batch_size, lambda batch, _: bare(batch))
        path = train(method, lm, learner, learning, held, out, training, progress=progress)
        return replace(self, editor=path)

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        edits = checked(self, edits, subject=False)
        editor = open_editor(self, lm)
        trained = MEND(**{**editor.settings, "layers": tuple(editor.settings["layers"])})
        texts = [Text(edit.text, edit.target_new) for edit in edits]
        deltas, loss = transformed(lm, trained, editor.tensors, texts)
        return weights_patch(self, lm, edits, deltas, notes={"layers": list(trained.layers or ()), "loss": loss})
