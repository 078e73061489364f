"""Patches that leave the weights alone: a memory beside the model, and what it may change.

A memory is one of three things. A *hook* changes what modules compute, a *prompt* memory what the model is asked, a
*router* who answers. All patches of one method on a stack are versions of one memory, each with what its edits added.

Whether a memory activates is decided on the prompt alone, once: while the prompt is read. The decision holds for the
tokens that are generated behind it, and for a target that is scored behind it. Where nobody says how much of a text
is the prompt (plain text, or the raw Hugging Face model), all of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from reknow.model.decoder import Decoder
from reknow.model.forward_context import ForwardContext
from reknow.model.hooks import by_row, hidden_states
from reknow.model.scoring import Score
from reknow.patching.patches import Patch

__all__ = [
    "AnswerModel",
    "HookMemory",
    "Hooks",
    "OutputChange",
    "PromptMemory",
    "Route",
    "RouterMemory",
    "hook_output",
    "versions",
]


class HookMemory(Protocol):
    """Changes what modules of the model compute; see `hook_output`."""

    def attach(self, lm: Decoder) -> Iterable[RemovableHandle]: ...


class PromptMemory(Protocol):
    """Rewrites prompts before they are encoded."""

    def prompts(self, lm: Decoder, texts: Sequence[str]) -> list[str]: ...


class AnswerModel(Protocol):
    """A model that answers in place of the edited one; an `LM` is one."""

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], separators: Sequence[str | None] | None = None
    ) -> list[Score]: ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **sampling: Any) -> list[str]: ...

    def likeliest(self, prompts: Sequence[str], count: int = 5) -> list[list[tuple[str, float]]]: ...


Route = tuple[AnswerModel, str]
"""Who answers, and the prompt for that model. The edited model itself may be named, with a prompt of the router's."""


class RouterMemory(Protocol):
    """Sends prompts to another model; None for a prompt that is out of scope."""

    def route(self, lm: Decoder, prompts: Sequence[str]) -> list[Route | None]: ...


OutputChange = Callable[[ForwardContext, Tensor, Tensor], Tensor]
"""(context, inputs, outputs) → outputs; (rows, columns, features), of the columns that are new in this pass."""


def hook_output(lm: Decoder, name: str, change: OutputChange) -> RemovableHandle:
    """Makes the output of the module `name` what `change` says."""

    def hook(_module, args, kwargs, output):
        context, states = lm.running.context, hidden_states(output)
        assert context is not None
        rows = len(context.ends)
        inputs = args[0] if args else next(iter(kwargs.values()))
        changed = change(context, by_row(inputs, rows), by_row(states, rows))
        changed = changed.to(states.dtype).reshape(states.shape)
        return type(output)([changed, *output[1:]]) if isinstance(output, (tuple, list)) else changed

    return lm.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)


class Hooks:
    """A memory that is nothing but changes of outputs; what is in use while a method learns.

    Args:
        changes: module → change, see `hook_output`.
    """

    def __init__(self, changes: Mapping[str, OutputChange]):
        self._changes = changes

    def attach(self, lm: Decoder) -> Iterator[RemovableHandle]:
        return (hook_output(lm, name, change) for name, change in self._changes.items())


def versions(patches: Sequence[Patch], method: str) -> list[Patch]:
    """The patches that make up the memory of a method, oldest first."""
    return [patch for patch in patches if patch.kind != "weights" and patch.method == method]
