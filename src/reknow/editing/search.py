"""What every method shares that searches a wanted state and spares general text: ROME, MEMIT and their kin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from reknow.checks.bounds import Formerly, Name, Natural, Number, Rate, Seed, Share, Units, Weight
from reknow.contract import Method
from reknow.editing.covariance import covariance
from reknow.editing.keys import warn_of_shared_keys
from reknow.editing.values import ValueSearch, contexts
from reknow.errors import EditRefused
from reknow.registry import METHODS

if TYPE_CHECKING:
    from reknow.edits import Edit
    from reknow.lm import LM

KEPT_BYTES = 2**31
"""How much memory matrices made of covariances may take between two edits."""
GPU_SHARE = 16
"""Which part of a GPU's memory they may take, where that is more: one of a 7B model is 1 GB."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Method):
    """Settings of every method that searches a wanted state and spares general text. No method by itself."""

    steps: Number = 60
    """Passes of the search at most, one more than updates; in the papers 20 to 30, all of them."""
    learning_rate: Rate = 0.1
    """Of Adam in the search, in units of the root mean square of the block's output, or of half that of the value
    matrix's where a norm or a multiplier follows it."""
    kl_weight: Weight = 0.0625
    """Weight of the drift of what the model says of "{subject} is a"."""
    weight_decay: Annotated[Weight, Formerly("decay")] = 0.05
    """Weight of the addition's length, relative to what it is added to, in the loss."""
    clamp: Weight = 1.0
    """Largest length of the addition, relative to what it is added to; in the papers 0.75, ROME's 4."""
    units: Units = "relative"
    """`relative`: the learning rate and the addition's length are measured by the model's own states. `absolute`: the
    learning rate is a plain number, and the length is divided by the square of the state's, as in the papers."""
    stop_probability: Share = 0.95
    """End a fact's search when the new answer has this probability in every context; 1: at a loss < 0.05 only, as in
    the papers."""
    min_delta: Annotated[Weight, Formerly("stop_gain")] = 0.005
    """End it too once the new answer is the likeliest in every context and the loss falls by less than this per pass;
    0: never, as in the papers."""
    context_batches: Annotated[Number, Formerly("turns")] = 2
    """Deal the contexts into so many hands of which each pass reads the next: several times less work; 1: all of them
    in every pass, as in the papers."""
    context_groups: tuple[tuple[Number, Number], ...] = ((5, 9),)
    """(how many, of how many tokens) texts sampled from the model to put before the prompt."""
    context_first_words: Annotated[tuple[str, ...], Formerly("context_starts")] = (
        "The",
        "Therefore",
        "Because",
        "I",
        "You",
    )
    """First words of those texts."""
    covariance_tokens: Natural = 100_000
    """Tokens of general text for C."""
    covariance_text: Name | None = None
    """A file, a folder or `hub:owner/name` to read them from; None: the bundled WikiText sample."""
    seed: Seed = 0
    """Of the sampled contexts."""

    def check(self, edits: Sequence[Edit]) -> None:
        for edit in edits:
            if edit.subject is None:
                others = [name for name, row in METHODS.items() if not issubclass(row.method, SearchSettings)]
                raise EditRefused(
                    f"{self.name} edits at the subject's last token and needs a subject; {edit.prompt!r} has none: "
                    "put it into braces, as in 'The capital of {France} is' (in Python: Edit.parse), or take a "
                    f"method that needs none: {', '.join(others)}",
                    edit,
                )
        if self.one_value_per_key():
            warn_of_shared_keys(self.name, edits)

    def one_value_per_key(self) -> bool:
        """Whether of edits with the same text up to the subject's end only one can be made in a patch."""
        return True

    def search(self, **rest) -> ValueSearch:
        """The search with these settings; `rest` are its fields that this method does not leave to the user."""
        known = {field.name for field in fields(self)}
        shared = {field.name for field in fields(ValueSearch)} & known
        return ValueSearch(**{name: getattr(self, name) for name in shared}, **rest)

    def contexts(self, lm: LM) -> tuple[str, ...]:
        """The texts to put before the prompt; the first is empty."""
        return contexts(lm, self.context_groups, starts=self.context_first_words, seed=self.seed)

    def covariance(self, lm: LM, layer: int) -> Tensor:
        """C of the layer's keys. (in, in), float32"""
        return covariance(lm, layer, tokens=self.covariance_tokens, text=self.covariance_text)

    def from_covariance(self, lm: LM, layer: int, make: Callable[..., Tensor], *settings) -> Tensor:
        """`make(C, *settings)`: a factor of C, a projector …

        The last ones are kept with the model while they are small, since one edit follows the other: reading C and
        taking it apart costs as much as many steps of the search.
        """
        name = lm.parts.value[layer]
        source = [getattr(self, field.name) for field in fields(self) if field.name.startswith("covariance_")]
        key = ("covariance", make.__name__, name, str(lm.weight(name).device), *source, *settings)
        budget, device = KEPT_BYTES, lm.weight(name).device
        if device.type == "cuda":
            budget = max(budget, torch.cuda.get_device_properties(device).total_memory // GPU_SHARE)
        return lm.cached(key, lambda: make(self.covariance(lm, layer), *settings), budget=budget)
