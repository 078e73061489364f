"""A run as tasks that depend on nothing but the base, so that any process may do any of them, in any order.

What is read or computed in one batch is one task, and which that is depends on the run alone. So the rows are the
same, to the last bit on like machines, however many processes share the tasks and however often they are killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from reknow.evaluation.plan import Plan
from reknow.evaluation.stages import AFTER_EDIT, END, IN_CONTEXT, UNEDITED, checkpoint

__all__ = ["Task", "blocks", "list_tasks"]

_BLOCK = 32
"""Cases that are read together."""


@dataclass(frozen=True)
class Task:
    """Some rows of a run that one process makes in one go."""

    kind: Literal["before", "in_context", "single", "sequence", "given"]
    """The unedited model asked, also with the edit in front of every question; a method's edits one by one, or in one
    patch or in patches upon each other; and a model that was edited already."""
    names: tuple[str, ...]
    """The cases."""
    label: str = UNEDITED
    seed: int = 0

    def keys(self, plan: Plan) -> list[tuple]:
        """The keys of its rows in the order in which they are made: (case,) of the unedited model, else `ROW_KEY`."""
        if self.kind == "before":
            return [(name,) for name in self.names]
        return [(self.label, self.seed, plan.mode, stage, name) for stage, name in self._stages(plan)]

    def _stages(self, plan: Plan) -> Iterator[tuple[str, str]]:
        if self.kind == "in_context":
            yield from ((IN_CONTEXT, name) for name in self.names)
        elif self.kind == "single":
            stages = single_stages(self.label, plan)
            yield from ((stage, name) for name in self.names for stage in stages)
        else:
            if plan.mode == "sequential":
                for start in range(0, len(self.names), plan.batch_size):
                    made = self.names[: start + plan.batch_size]
                    yield from ((AFTER_EDIT, name) for name in made[start:])
                    if len(made) in plan.checkpoints and len(made) < len(self.names):
                        yield from ((checkpoint(len(made)), name) for name in made)
            yield from ((END, name) for name in self.names)

    @property
    def place(self) -> str:
        """Where in a run folder its patches are kept; empty: it keeps none."""
        return f"patches/{quote(self.label, safe='')}-{self.seed}" if self.kind == "sequence" else ""

    def __str__(self) -> str:
        what = self.kind if self.label == UNEDITED else f"{self.label}, seed {self.seed}"
        return f"{what}, {self.names[0]}" + (f" to {self.names[-1]}" if len(self.names) > 1 else "")


def list_tasks(
    names: Sequence[str], together: Mapping[str, int], plan: Plan, oracle: Sequence[str] | None = None
) -> list[Task]:
    """All tasks of a run, in the order in which one process does them.

    Args:
        names: its cases.
        together: label of each method → how many single edits it computes at a time (`Method.edits_per_call`).
        oracle: the cases that the unedited model is also asked with the edit in front, where these are not all.
    """
    tasks = [Task("before", block) for block in blocks(names)]
    if plan.in_context or plan.oracle:
        asked = names if oracle is None else oracle
        tasks += [Task("in_context", block, seed=plan.seeds[0]) for block in blocks(asked)]
    for label, size in together.items():
        for seed in plan.seeds:
            if plan.mode == "single":
                tasks += [Task("single", block, label, seed) for block in blocks(names, size)]
            else:
                tasks.append(Task("sequence", tuple(names), label, seed))
    return tasks


def single_stages(label: str, plan: Plan) -> list[str]:
    """At which stages a case is read after a single edit."""
    return [AFTER_EDIT, IN_CONTEXT] if label in plan.in_context else [AFTER_EDIT]


def blocks(names: Sequence[str], size: int = _BLOCK) -> list[tuple[str, ...]]:
    """The names in blocks of that size; the last may be smaller."""
    return [tuple(names[start : start + size]) for start in range(0, len(names), size)]
