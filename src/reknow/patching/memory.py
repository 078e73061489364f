"""Patches that leave the weights alone: a memory beside the model, and how it comes into play.

A memory is one of three things. A *hook* changes what modules compute, a *prompt* memory what the model is asked, a
*router* who answers. They compose in this order: the weights, hooks as they lie in the stack, prompts, routers; the
newest outermost. All patches of one method on a stack are versions of one memory, each with what its edits added.

Whether a memory speaks up is decided on the prompt alone, once: while the prompt is read. The decision holds for the
tokens that are generated behind it, and for a target that is scored behind it. Where nobody says how much of a text
is the prompt (plain text, or the raw Hugging Face model), all of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from reknow.errors import PatchError
from reknow.model.decoder import Decoder
from reknow.model.exclusive import exclusive, undo_on_exit
from reknow.model.forward_context import ForwardContext, context_of
from reknow.model.hooks import by_row, hidden_states
from reknow.patching.patches import Patch
from reknow.registry import METHODS

if TYPE_CHECKING:
    from reknow.model.scoring import Score

T = TypeVar("T")

CACHE_SIZE = 4
"""Memories that are kept ready for the next change of the stack."""


class HookMemory(Protocol):
    """Changes what modules of the model compute; see `hook_output`."""

    def attach(self, lm: Decoder) -> Iterable[RemovableHandle]: ...


class PromptMemory(Protocol):
    """Rewrites prompts before they are encoded."""

    def prompts(self, lm: Decoder, texts: Sequence[str]) -> list[str]: ...


class AnswerModel(Protocol):
    """Another model that answers; an `LM` is one."""

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], separators: Sequence[str | None] | None = None
    ) -> list[Score]: ...

    def generate(self, prompts: Sequence[str], max_new_tokens: int, **sampling: Any) -> list[str]: ...


Route = tuple[AnswerModel, str]
"""Who answers, and the prompt for that model. The edited model itself may be named, with a prompt of the router's."""


class RouterMemory(Protocol):
    """Sends prompts to another model; None for a prompt that is none of its business."""

    def route(self, lm: Decoder, prompts: Sequence[str]) -> list[Route | None]: ...


Change = Callable[[ForwardContext, Tensor, Tensor], Tensor]
"""(context, inputs, outputs) → outputs; (rows, columns, features), of the columns that are new in this pass."""


def hook_output(lm: Decoder, name: str, change: Change) -> RemovableHandle:
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

    def __init__(self, changes: Mapping[str, Change]):
        self._changes = changes

    def attach(self, lm: Decoder) -> Iterator[RemovableHandle]:
        return (hook_output(lm, name, change) for name, change in self._changes.items())


def versions(patches: Sequence[Patch], method: str) -> list[Patch]:
    """The patches that make up the memory of a method, oldest first."""
    return [patch for patch in patches if patch.kind != "weights" and patch.method == method]


class Memories:
    """The memories in use on one model."""

    def __init__(self, lm: Decoder):
        self._lm = lm
        self._active: dict[str, tuple[str, Any]] = {}
        """method → (kind, memory) in the order of the stack."""
        self._handles: list[RemovableHandle] = []
        self._built: dict[tuple, Any] = {}

    @property
    def hooked(self) -> bool:
        """Whether modules of the model compute something else than their weights say."""
        return bool(self._handles)

    def set(self, patches: Sequence[Patch]) -> None:
        """Puts exactly the memories of these patches in use; where it fails or is interrupted, some of them.

        Raises:
            PatchError: a memory of a method that this library does not have, or that does not fit the model.
        """
        names = dict.fromkeys(patch.method for patch in patches if patch.kind != "weights")
        wanted = {name: self._memory(name, versions(patches, name)) for name in names}
        try:
            self._attach(wanted)
        except (AttributeError, RuntimeError) as error:
            raise PatchError(
                f"expected a memory that fits {self._lm.name}; got one of another model ({error}): load that model"
            ) from error

    @contextmanager
    def temporary_memory(self, method: str, memory: HookMemory):
        """While open, this is the memory of the method, whatever the stack says."""
        with exclusive(self._lm.model):
            before = self._active
            with undo_on_exit(lambda: self._attach(before)):
                self._attach({**before, method: ("hook", memory)})
                yield

    def _attach(self, memories: dict[str, tuple[str, Any]]) -> None:
        self._detach()
        hooks = [memory for kind, memory in memories.values() if kind == "hook"]
        if hooks:
            opening = self._lm.model.register_forward_pre_hook(self._open, with_kwargs=True)
            self._handles = [opening]
        for memory in hooks:
            for handle in memory.attach(self._lm):  # one by one, so that those before a failure come off
                self._handles.append(handle)
        self._active = memories

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._active, self._lm.running.context = [], {}, None

    def _open(self, _module, args, kwargs) -> None:
        running = self._lm.running
        running.context = context_of(args, kwargs, running.context, running.ends)

    def _memory(self, name: str, patches: list[Patch]) -> tuple[str, Any]:
        """(kind, memory) of these versions; built once, since stacks are put on and off often."""
        key = (name, *(patch.id for patch in patches))
        memory = self._built.pop(key, None)
        if memory is None:
            kind = memory_class(patches[-1])
            try:
                memory = kind.memory(self._lm, patches)
            except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
                raise PatchError(
                    f"expected the tensors and facts of a {name} memory; {patches[-1].label} lacks some "
                    f"({type(error).__name__}: {error}): make the edit again"
                ) from error
        self._built[key] = memory  # the last one used stands last
        while len(self._built) > CACHE_SIZE:
            del self._built[next(iter(self._built))]
        return patches[-1].kind, memory

    def answered(
        self, prompts: Sequence[str], answer: Callable[[AnswerModel | None, list[int], list[str]], Sequence[T]]
    ) -> list[T]:
        """One answer per prompt, by the model whom the routers name.

        Args:
            answer: (who, which, texts) → answers; `who` is None for the model itself, `which` are the indices of the
                prompts, `texts` what they became.
        """
        found: dict[int, T] = {}
        for who, which, texts in self._asked(list(prompts)):
            found.update(zip(which, answer(who, which, texts), strict=True))
        return [found[i] for i in range(len(prompts))]

    def _asked(self, prompts: list[str]) -> list[tuple[AnswerModel | None, list[int], list[str]]]:
        """Who answers which prompts, and what they are asked."""
        asked: dict[int, tuple[AnswerModel | None, list[int], list[str]]] = {}
        own = list(range(len(prompts)))
        for kind, memory in reversed(self._active.values()):
            if kind != "router" or not own:
                continue
            routes = memory.route(self._lm, [prompts[i] for i in own])
            for i, route in zip(own, routes, strict=True):
                if route is not None:
                    who = None if route[0] is self._lm else route[0]
                    _, which, texts = asked.setdefault(id(who), (who, [], []))
                    which.append(i)
                    texts.append(route[1])
            own = [i for i, route in zip(own, routes, strict=True) if route is None]
        texts = [prompts[i] for i in own]
        for kind, memory in reversed(self._active.values()):
            if kind == "prompt" and texts:
                texts = memory.prompts(self._lm, texts)
        if own or not prompts:
            _, which, together = asked.setdefault(id(None), (None, [], []))
            which += own
            together += texts
        return list(asked.values())


def memory_class(patch: Patch) -> Any:
    """The class in the table of methods whose code runs this memory.

    Raises:
        PatchError: there is none.
    """
    row = METHODS.get(patch.method)
    if row is None or row.method.kind != patch.kind:
        raise PatchError(
            f"expected a memory of a method that this version of reknow has; {patch.label} is a {patch.kind} of "
            f"{patch.method}: install the version that made it ({patch.version or 'unknown'})"
        )
    return row.method
