"""Low-rank adapters as a way of editing: LoRA, AdaLoRA and QLoRA, trained by the library `peft`.

* LoRA (Hu et al. 2021, arXiv 2106.09685): the change of a matrix is a product of two thin ones, trained from 0.
* AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): written like a singular value decomposition, whose smallest values
  are cut on the way, so that important matrices keep more rank. What EasyEdit's LoRA is by default.
* QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the same as LoRA, against weights rounded to four bits (NF4).

    min over A, B of  mean over answer tokens of −log P(token | …),    ΔW = (α / r) B A,   B (out, r), A (r, in)

The patch holds the factors, and is saved as the folder that `peft` itself loads; a file where they change the experts
of a mixture, which `peft` cannot name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from reknow.checks.bounds import Formerly, NonNegative, Number, Rank, Rate, Seed
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.adapters import adapters_in_use, four_bit_weights, read_factors
from reknow.editing.descent import descend
from reknow.editing.layers import resolve_layers
from reknow.edits import Edit
from reknow.errors import ModelError
from reknow.lm import LM
from reknow.model.hooks import forward_replaced
from reknow.model.loading import carries_adapters
from reknow.model.parts import groups
from reknow.model.tokens import EncodedText, Text
from reknow.patching.patches import Patch
from reknow.patching.peft_folder import describe_base

_Variant = Literal["lora", "adalora", "qlora"]
_MatrixName = Literal["value", "up", "attention_out"]


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adapters on chosen matrices of chosen layers, several edits at once."""

    variant: Annotated[_Variant, Formerly("kind")] = "lora"
    """Fixed rank, rank shared out among the matrices, or fixed rank against a base in four bits."""
    layers: tuple[int, ...] | None = None
    """Layers that get adapters; None: a sixth of the model, five at most, around `suggest_layer`."""
    matrices: Annotated[tuple[_MatrixName, ...], Field(min_length=1), Formerly("places")] = ("value",)
    """Which matrices of a layer: the value matrix, those that read the MLP's input, attention's output."""
    rank: Rank = 8
    """Rank r of each change; AdaLoRA: on average, from half as much again at the start."""
    alpha: Rate = 8.0
    """The product is multiplied by α / r, and by how much larger the matrices are than 1 / √in on average."""
    steps: Number = 30
    """Passes over all edits."""
    learning_rate: Rate = 5e-3
    """How far Adam moves an entry of the factors in a step."""
    stop_loss: NonNegative = 1e-2
    """End when the mean loss is below; AdaLoRA runs through all steps, since its ranks are settled at the end."""
    batch_size: Number = 32
    """Edits per update; edits of similar length share a batch."""
    seed: Seed = 0
    """Seed of the factors at the start."""

    @property
    def name(self) -> str:
        return self.variant

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        if carries_adapters(lm.model):
            raise ModelError(
                f"expected a model without adapters, since {self.name} puts its own into it; {lm.name} carries some: "
                "merge them, model.merge_and_unload(), or use another method"
            )
        edits = check_edits(self, edits, lm)
        layers = resolve_layers(lm, self.layers)
        rows = lm.encode([Text.asked(edit) for edit in edits])
        lm.check_length(rows)
        rows.sort(key=lambda row: len(row.ids))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        names = [name for layer in layers for matrix in self.matrices for name in _names(lm, layer, matrix)]
        with ExitStack() as stack, torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if self.variant == "qlora":
                stack.enter_context(four_bit_weights(lm))
            adaptive_steps = self.steps if self.variant == "adalora" else None
            adapters = adapters_in_use(lm, names, rank=self.rank, alpha=self.alpha, adaptive_steps=adaptive_steps)
            tuner = stack.enter_context(adapters)
            losses = self._train(lm, tuner, batches)
            deltas = {name: read_factors(lm.model.get_submodule(name)) for name in names}
        notes: dict[str, Any] = {"layers": layers, "losses": losses}
        if all(groups(lm.model.get_submodule(name)) == 1 for name in names):  # those of experts `peft` cannot name
            notes["adapter"] = describe_base(lm, names)
        # AdaLoRA may leave a matrix without any rank.
        return make_patch(self, lm, edits, {n: delta for n, delta in deltas.items() if delta.rank}, notes=notes)

    def _train(self, lm: LM, tuner: Any, batches: list[list[EncodedText]]) -> list[float]:
        """Trains the adapters; gives the mean loss of every pass."""
        trained = [parameter for parameter in tuner.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()  # Adam's small terms vanish in half precision
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        adaptive = self.variant == "adalora"

        def update(losses: Tensor, _running: Tensor) -> None:
            optimizer.zero_grad()
            losses[0].backward()
            optimizer.step()

        passes = descend(
            [partial(_batch_loss, lm, tuner, rows) for rows in batches],
            update,
            self.steps,
            lambda losses: losses.mean() < (0.0 if adaptive else self.stop_loss),
            after_pass=lambda step: tuner.update_and_allocate(step + 1) if adaptive else None,
        )
        return [fmean(losses) for losses in passes]


def _names(lm: LM, layer: int, matrix: _MatrixName) -> tuple[str, ...]:
    """Names of these matrices of the layer."""
    if matrix == "up":
        return lm.mlp_in(layer)
    return ((lm.parts.value if matrix == "value" else lm.parts.attention_out)[layer],)


def _batch_loss(lm: LM, tuner: Any, rows: Sequence[EncodedText]) -> Tensor:
    """Mean NLL of the answers' tokens, the same for every row; AdaLoRA's model adds its term that keeps the factors
    orthogonal. (rows,)"""
    batch = lm.pad(rows, anchors=[0] * len(rows))
    labels = torch.full_like(batch.ids, -100)
    for i, row in enumerate(rows):
        labels[i, row.prompt_length : len(row.ids)] = batch.ids[i, row.prompt_length : len(row.ids)]
    output = lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends, labels=labels)
    # AdaLoRA's would call the model past its hooks, by which memories know what is read.
    with forward_replaced(lm.model, lambda **_: output):
        return tuner(input_ids=batch.ids).loss.expand(len(rows))
