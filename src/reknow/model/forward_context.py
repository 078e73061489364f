"""What is known of the texts that a pass reads: how much of them is prompt, and what was decided on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from reknow.errors import PatchError

_T = TypeVar("_T")


@dataclass
class ForwardContext:
    """The texts that a pass reads: what a hook may know of them."""

    mask: Tensor  # (rows, columns) 1 on real tokens, of this pass and of those that the cache holds
    new: int
    """How many columns, the last ones, this pass computes."""
    ends: Tensor  # (rows,) column behind the prompt's last token
    _decisions: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_prefill(self) -> bool:
        """Whether this pass reads the texts from their beginning, prompts included."""
        return self.new == self.mask.shape[1]

    def decision(self, who: Any, decide: Callable[[], _T] | None = None) -> _T:
        """What `decide` says when the prompts are read; the same again for tokens generated behind them.

        Without `decide`: what a lower module of the same memory decided.

        Raises:
            PatchError: the prompts were read before the memory `who` was there.
        """
        if self.is_prefill and decide is not None:
            self._decisions[who] = decide()
        elif who not in self._decisions:
            raise PatchError(
                "expected a key/value cache of prompts that were read with the memory applied; "
                "got an older one: read the prompts again"
            )
        return self._decisions[who]

    def last_prompt_state(self, states: Tensor) -> Tensor:
        """States (rows, columns, features) at each prompt's last token, in a prefill. (rows, features)"""
        return states[torch.arange(len(self.ends), device=states.device), self.ends.to(states.device) - 1]

    @property
    def of_prompt(self) -> Tensor:
        """Which of the new columns hold tokens of the prompt. (rows, new), boolean"""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        inside = (columns[None] < self.ends.to(self.mask.device)[:, None]) & self.mask.bool()
        return inside[:, -self.new :]

    @property
    def last_of_prompt(self) -> Tensor:
        """Which of the new columns hold the last token of the prompt. (rows, new), boolean"""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (columns[None] == self.ends.to(self.mask.device)[:, None] - 1)[:, -self.new :]


class RunningPass(threading.local):
    """The pass that runs in a thread."""

    context: ForwardContext | None = None
    """What hooks of memories know of it; None where there are none."""
    ends: Tensor | None = None
    """Where its prompts end, if its caller says so."""


def context_of(args: tuple, kwargs: dict, before: ForwardContext | None, ends: Tensor | None) -> ForwardContext:
    """What is known of a pass of the model with these arguments; behind a cache it goes on from the one before."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    ids = kwargs["inputs_embeds"] if ids is None else ids
    rows, new = ids.shape[:2]
    cache = kwargs.get("past_key_values")
    width = new + (0 if cache is None else int(cache.get_seq_length()))
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != (rows, width):
        mask = torch.ones(rows, width, dtype=torch.long, device=ids.device)
    if width > new and before is not None and len(before.ends) == rows:
        return ForwardContext(mask, new, before.ends, before._decisions)
    return ForwardContext(mask, new, width - mask.flip(1).argmax(1) if ends is None else ends)
