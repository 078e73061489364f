"""Low-rank adapters as a way of editing: LoRA, AdaLoRA and QLoRA, trained by the library `peft`.

* LoRA (Hu et al. 2021, arXiv 2106.09685): the change of a matrix is a product of two thin ones, trained from 0.
* AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): written like a singular value decomposition, whose smallest values
  are cut on the way, so that important matrices keep more rank. What EasyEdit's LoRA is by default.
* QLoRA (Dettmers et al. 2023, arXiv 2305.14314): the same as LoRA, against weights rounded to four bits (NF4).

    min over A, B of  mean over answer tokens of −log P(token | …),    ΔW = (α / r) B A,   B (out, r), A (r, in)

The patch holds the factors, and is saved as the folder that `peft` itself loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from reknow.checks.bounds import Number, Rank, Rate, Seed, Weight
from reknow.contract import Method, check_edits, make_patch
from reknow.editing.layers import resolve_layers
from reknow.edits import Edit
from reknow.errors import InputError, MissingExtra, ModelError
from reknow.model.exact import finite_loss
from reknow.model.exclusive import undo_on_exit
from reknow.model.hooks import forward_replaced, weight_replaced
from reknow.model.loading import carries_adapters
from reknow.model.parts import Conv1D, is_matrix
from reknow.model.tokens import Row, Text
from reknow.patching.deltas import LowRank
from reknow.patching.patches import Patch
from reknow.patching.peft_folder import base_of
from reknow.progress import told

if TYPE_CHECKING:
    from reknow.lm import LM

Kind = Literal["lora", "adalora", "qlora"]
Place = Literal["value", "up", "attention_out"]
ADAPTER = "default"


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adapters on chosen matrices of chosen layers, several edits at once."""

    kind: Kind = "lora"
    """Fixed rank, rank shared out among the matrices, or fixed rank against a base in four bits."""
    layers: tuple[int, ...] | None = None
    """Layers that get adapters; None: a sixth of the model, five at most, around `suggest_layer`."""
    places: tuple[Place, ...] = ("value",)
    """Which matrices of a layer: the value matrix, the MLP's input, attention's output."""
    rank: Rank = 8
    """Of each change; AdaLoRA: on average, from half as much again at the start."""
    alpha: Rate = 8.0
    """The product is multiplied by α / rank, and by how much larger the matrices are than 1 / √in on average."""
    steps: Number = 30
    """Passes over all edits."""
    learning_rate: Rate = 5e-3
    """Of Adam."""
    stop_loss: Weight = 1e-2
    """End when the mean loss is below; AdaLoRA runs through all steps, since its ranks are settled at the end."""
    batch_size: Number = 32
    """Edits per update; edits of similar length share a batch."""
    seed: Seed = 0
    """Of the first factors."""

    def __post_init__(self):
        super().__post_init__()
        if not self.places:
            raise InputError(f"expected places among {', '.join(get_args(Place))}; got none: choose from these")

    @property
    def name(self) -> str:
        return self.kind

    def edit(self, lm: LM, edits: Sequence[Edit]) -> Patch:
        if carries_adapters(lm.model):
            raise ModelError(
                f"expected a model without adapters, since {self.name} puts its own into it; {lm.name} carries some: "
                "merge them, model.merge_and_unload(), or use another method"
            )
        edits = check_edits(self, edits)
        layers = resolve_layers(lm, self.layers)
        rows = lm.encode([Text.asked(edit) for edit in edits])
        lm.check_length(rows)
        rows.sort(key=lambda row: len(row.ids))
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        names = [name for layer in layers for name in self._matrices(lm, layer)]
        with ExitStack() as stack, torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if self.kind == "qlora":
                stack.enter_context(_rounded_to_four_bits(lm))
            tuner = stack.enter_context(self._adapters(lm, names))
            losses = self._descend(lm, tuner, batches)
            deltas = {name: _factors(lm.model.get_submodule(name)) for name in names}
        conv = any(isinstance(lm.model.get_submodule(name), Conv1D) for name in names)
        notes = {"layers": layers, "losses": losses, "adapter": base_of(lm, conv)}
        left = {name: delta for name, delta in deltas.items() if delta.rank}  # AdaLoRA may give a matrix none
        return make_patch(self, lm, edits, dict(left), notes=notes)

    def _matrices(self, lm: LM, layer: int) -> list[str]:
        parts = lm.parts
        found = {
            "value": (parts.value[layer],),
            "up": parts.mlp_in[layer],
            "attention_out": (parts.attention_out[layer],),
        }
        return [name for place in self.places for name in found[place]]

    @contextmanager
    def _adapters(self, lm: LM, names: list[str]):
        """While open, `peft`'s layers stand around the matrices; yields its model."""
        try:
            from peft import AdaLoraConfig, AdaLoraModel, LoraConfig, LoraModel
        except ImportError as error:
            raise MissingExtra("peft", "lora", f"the method {self.name}") from error
        conv = any(isinstance(lm.model.get_submodule(name), Conv1D) for name in names)
        shared: dict[str, Any] = dict(
            target_modules=names, lora_alpha=self.alpha, lora_dropout=0.0, fan_in_fan_out=conv
        )
        originals = {name: lm.model.get_submodule(name) for name in names}
        attributes = set(vars(lm.model))

        def removed() -> None:
            for name, module in originals.items():
                parent, _, leaf = name.rpartition(".")
                setattr(lm.model.get_submodule(parent), leaf, module)
            for name in set(vars(lm.model)) - attributes:
                delattr(lm.model, name)
            lm.model.requires_grad_(False).eval()

        with undo_on_exit(removed):
            if self.kind == "adalora":
                # Ranks are free for a fifth of the steps, shared out until two fifths from the end, then fixed.
                config = AdaLoraConfig(
                    target_r=self.rank,
                    init_r=self.rank + self.rank // 2,
                    total_step=self.steps + 1,
                    tinit=self.steps // 5,
                    tfinal=2 * self.steps // 5,
                    deltaT=1,
                    **shared,
                )
                yield AdaLoraModel(lm.model, {ADAPTER: config}, ADAPTER)
            else:
                yield LoraModel(lm.model, {ADAPTER: LoraConfig(r=self.rank, **shared)}, ADAPTER)

    def _descend(self, lm: LM, tuner: nn.Module, batches: list[list[Row]]) -> list[float]:
        trained = [parameter for parameter in tuner.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()  # Adam's small terms vanish in half precision
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        adaptive = self.kind == "adalora"
        losses: list[float] = []
        for step in range(self.steps):
            total, count = 0.0, 0
            for rows in batches:
                loss = _loss(lm, tuner, rows)
                value = finite_loss(loss)
                total, count = total + value * len(rows), count + len(rows)
                if adaptive or value >= self.stop_loss:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            if adaptive:
                tuner.update_and_allocate(step + 1)  # type: ignore[operator]
            losses.append(total / count)
            told(step, self.steps, losses[-1])
            if not adaptive and losses[-1] < self.stop_loss:
                break
        return losses


def _loss(lm: LM, tuner: nn.Module, rows: Sequence[Row]) -> Tensor:
    """Mean NLL of the answers' tokens; AdaLoRA's model adds its term that keeps the factors orthogonal."""
    batch = lm.pad(rows, anchors=[0] * len(rows))
    labels = torch.full_like(batch.ids, -100)
    for i, row in enumerate(rows):
        labels[i, row.prompt_length : len(row.ids)] = batch.ids[i, row.prompt_length : len(row.ids)]
    found = lm.forward(batch.ids, batch.mask, batch.positions, None, ends=batch.ends, labels=labels)
    # AdaLoRA's would call the model past its hooks, by which memories know what is read.
    with forward_replaced(lm.model, lambda **_: found):
        return tuner(input_ids=batch.ids).loss


@torch.no_grad()
def _factors(layer: Any) -> LowRank:
    """The change that one of `peft`'s layers makes. (out, in)"""
    scale, left, right = layer.scaling[ADAPTER], layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
    if not hasattr(layer, "lora_E"):
        return LowRank((scale * left.weight).float(), right.weight.float().clone())
    values = layer.lora_E[ADAPTER]  # (rank, 1)
    kept = values[:, 0] != 0
    scale = scale / (float(layer.ranknum[ADAPTER]) + 1e-5)  # as in peft's forward pass
    return LowRank((scale * left[:, kept]).float(), (values * right)[kept].float())


@contextmanager
def _rounded_to_four_bits(lm: LM):
    """While open, every matrix of the blocks multiplies by its weight as NF4 would store it."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "qlora", "the method qlora") from error

    def rounded(weight: Tensor) -> Tensor:
        return dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4"))

    with ExitStack() as stack:
        for block in lm.parts.blocks:
            for name, module in lm.model.get_submodule(block).named_modules():
                if is_matrix(module):
                    stack.enter_context(weight_replaced(module, rounded(lm.weight(f"{block}.{name}"))))
        yield
