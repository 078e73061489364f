"""Edits tried on a model: the patch, and what it changes and what not; the model is left as it was.

tried = try_edits(lm, ROME(), [edit])
tried.before, tried.after, tried.harms
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from reknow.contract import Method
from reknow.datasets.facts import Fact
from reknow.edits import Edit
from reknow.errors import EditFailed
from reknow.evaluation.effect import Snapshot, collapsed, control_facts, observe
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.fingerprint import weight_bits
from reknow.patching.patches import Patch

__all__ = ["Tried", "try_edits"]


@dataclass(frozen=True)
class Tried:
    """A patch, and the model at two moments."""

    patch: Patch
    seconds: float
    """What making it took."""
    facts: tuple[Fact, ...]
    """The other facts that were asked."""
    also: tuple[str, ...]
    """Further prompts that were asked, such as the request in other words."""
    before: Snapshot
    after: Snapshot
    tensors: int
    """How many of the model's were compared bit for bit after the patch was off again: all are as before."""

    @property
    def kept(self) -> list[bool]:
        """Of each fact, whether it is continued word for word as before."""
        return [old == new for old, new in zip(self.before.controls, self.after.controls, strict=True)]

    @property
    def said(self) -> int:
        """How many of the edits' answers the edited model says."""
        return sum(answer.said for answer in self.after.answers)

    @property
    def harms(self) -> list[str]:
        """What of the model the patch broke besides its facts, a clause for each."""
        return collapsed(self.before, self.after)


@typed_exclusively
def try_edits(lm: LM, method: Method, edits: Sequence[Edit], also: Sequence[str] = ()) -> Tried:
    """Makes the edits on the model as it is, and asks it without the patch and with it.

    Args:
        also: further prompts to ask.

    Raises:
        InputError, EditRefused: see `Method.edit`.
        EditFailed: the computation broke down, or weights did not come back.
    """
    bits = weight_bits(lm.model)
    started = time.perf_counter()
    patch = method.edit(lm, edits)
    seconds = time.perf_counter() - started
    facts = tuple(control_facts(lm, edits))
    with lm.progress.stage("reading before and after", 2) as advance:
        before = observe(lm, edits, facts, also)
        advance()
        with lm.patched(patch):
            after = observe(lm, edits, facts, also)
    if weight_bits(lm.model) != bits:
        raise EditFailed(
            "expected the base model back bit for bit; got other weights: nothing was written, report it"
        )
    return Tried(patch, seconds, facts, tuple(also), before, after, len(bits))
