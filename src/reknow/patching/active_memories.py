"""The memories in use on one model, and how they compose.

First the weights, then hooks as they lie in the stack, then prompts, then routers; the newest outermost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.hooks import RemovableHandle

from reknow.errors import PatchError
from reknow.model.decoder import Decoder
from reknow.model.exclusive import exclusive, undo_on_exit
from reknow.model.forward_context import context_of
from reknow.patching.memory import AnswerModel, HookMemory, versions
from reknow.patching.patches import Patch
from reknow.patching.record import PatchKind
from reknow.registry import METHODS

__all__ = ["ActiveMemories"]

_Answer = TypeVar("_Answer")
_Asked = tuple[AnswerModel | None, list[int], list[str]]
"""Who answers (None: the model itself), the indices of the prompts, and what they became."""

_CACHE_SIZE = 4
"""Memories that are kept ready for the next change of the stack."""


class ActiveMemories:
    """The memories in use on one model."""

    def __init__(self, lm: Decoder):
        self._lm = lm
        self._active: dict[str, tuple[PatchKind, Any]] = {}
        """method → (kind, memory) in the order of the stack."""
        self._handles: list[RemovableHandle] = []
        self._built: dict[tuple[str, ...], Any] = {}
        """(method, ids of the versions) → memory, the last one used behind the others."""

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
        active = {name: self._memory(name, versions(patches, name)) for name in names}
        try:
            self._attach(active)
        except (AttributeError, RuntimeError) as error:
            raise PatchError(
                f"expected a memory that fits {self._lm.name}; got one of another model ({error}): load that model"
            ) from error

    @contextmanager
    def temporary(self, method: str, memory: HookMemory):
        """While open, this is the memory of the method, whatever the stack says."""
        with exclusive(self._lm.model):
            before = self._active
            with undo_on_exit(lambda: self._attach(before)):
                self._attach({**before, method: ("hook", memory)})
                yield

    def _attach(self, active: dict[str, tuple[PatchKind, Any]]) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._active, self._lm.running.context = [], {}, None
        hooks = [memory for kind, memory in active.values() if kind == "hook"]
        if hooks:
            self._handles = [self._lm.model.register_forward_pre_hook(self._note_context, with_kwargs=True)]
        for memory in hooks:
            for handle in memory.attach(self._lm):  # one by one, so that those before a failure come off
                self._handles.append(handle)
        self._active = active

    def _note_context(self, _module, args, kwargs) -> None:
        running = self._lm.running
        running.context = context_of(args, kwargs, running.context, running.ends)

    def _memory(self, method: str, patches: list[Patch]) -> tuple[PatchKind, Any]:
        """(kind, memory) of these versions; built once, since stacks are put on and off often."""
        key = (method, *(patch.id for patch in patches))
        self._built[key] = self._built.pop(key) if key in self._built else self._build(patches)
        while len(self._built) > _CACHE_SIZE:
            del self._built[next(iter(self._built))]
        return patches[-1].kind, self._built[key]

    def _build(self, patches: list[Patch]) -> Any:
        """The memory that the code of the patches' method makes of them."""
        newest = patches[-1]
        row = METHODS.get(newest.method)
        if row is None or row.method.kind != newest.kind:
            raise PatchError(
                f"expected a memory of a method that this version of reknow has; {newest.label} is a {newest.kind} "
                f"of {newest.method}: install the version that made it ({newest.version or 'unknown'})"
            )
        if (spec := row.method.state_spec) is not None:
            spec.check_versions(patches)
        try:
            return row.method.running_memory(self._lm, patches)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise PatchError(
                f"expected the tensors and facts of a {newest.method} memory; {newest.label} lacks some "
                f"({type(error).__name__}: {error}): make the edit again"
            ) from error

    # --- who is asked what ---------------------------------------------------------------------------------

    def answer_each(
        self, prompts: Sequence[str], answer: Callable[[AnswerModel | None, list[int], list[str]], Sequence[_Answer]]
    ) -> list[_Answer]:
        """One answer per prompt, by the model whom the routers name.

        Args:
            answer: (who, which, texts) → answers; see `_Asked`.
        """
        answers: dict[int, _Answer] = {}
        for who, which, texts in self._route(list(prompts)):
            answers.update(zip(which, answer(who, which, texts), strict=True))
        return [answers[i] for i in range(len(prompts))]

    def _route(self, prompts: list[str]) -> list[_Asked]:
        """What is asked of whom: every prompt by the newest router in whose scope it is, else of the model itself, as
        the prompt memories have it."""
        asked: dict[int, _Asked] = {}
        left = list(range(len(prompts)))
        for router in self._newest_first("router"):
            routes = router.route(self._lm, [prompts[i] for i in left]) if left else []
            for i, route in zip(left, routes, strict=True):
                if route is not None:
                    who = None if route[0] is self._lm else route[0]
                    _, which, texts = asked.setdefault(id(who), (who, [], []))
                    which.append(i)
                    texts.append(route[1])
            left = [i for i, route in zip(left, routes, strict=True) if route is None]
        rest = [prompts[i] for i in left]
        for memory in self._newest_first("prompt") if left else ():
            rest = memory.prompts(self._lm, rest)
        if left or not prompts:
            _, which, texts = asked.setdefault(id(None), (None, [], []))
            which += left
            texts += rest
        return list(asked.values())

    def _newest_first(self, kind: PatchKind) -> list[Any]:
        return [memory for other, memory in reversed(self._active.values()) if other == kind]
