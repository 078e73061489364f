"""What is done for a task of a run: the unedited model is asked, or edits are made and the model asked again."""

from __future__ import annotations

from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from reknow.contract import Method, field_values
from reknow.edits import Case, to_json
from reknow.evaluation.attempts import Cost, attempt, attempt_each, case_cost
from reknow.evaluation.differences import WeightChange
from reknow.evaluation.held_out import HeldOut
from reknow.evaluation.plan import Plan
from reknow.evaluation.probing import read_compared
from reknow.evaluation.side_by_side import sample_side_by_side
from reknow.evaluation.soundness import relative_norms
from reknow.evaluation.stages import AFTER_EDIT, END, IN_CONTEXT, checkpoint
from reknow.evaluation.tasks import Task, blocks, single_stages
from reknow.lm import LM
from reknow.model.readable import find_unreadable
from reknow.patching.patches import Patch

__all__ = ["Reader", "Run"]

_BEFORE_QUESTIONS = ("prompt", "router")
"""Kinds of memory that put texts before the questions."""


class Reader:
    """Asks the questions of the cases, as far as the plan wants them.

    Attributes:
        held_out: the held-out texts, once the model that edits are compared with has read them.
        weight_change: of a model that somebody else edited, where its base's weights are known.
    """

    def __init__(
        self,
        lm: LM,
        cases: Mapping[str, Case],
        plan: Plan,
        held_out: HeldOut | None = None,
        weight_change: WeightChange | None = None,
    ):
        self.lm, self.cases, self.plan = lm, cases, plan
        self.stack_before = lm.patches
        found = find_unreadable(lm, list(cases.values()), in_context=bool(plan.in_context))
        self._reasons = dict(zip(cases, found, strict=True))
        self.held_out, self.weight_change = held_out, weight_change
        lengthened = any(patch.kind in _BEFORE_QUESTIONS for patch in lm.patches)
        self._unsure = {name for name, reason in self._reasons.items() if reason is None and lengthened}

    def unreadable(self, names: Sequence[str]) -> dict[str, str]:
        """Those of the cases that the base cannot read, and why; it is asked where its memories decide that."""
        for block in blocks([name for name in names if name in self._unsure]):
            self.read(block, texts=True)
        return {name: reason for name in names if (reason := self._reasons[name]) is not None}

    def read(
        self,
        names: Sequence[str],
        *,
        texts: bool,
        seed: int = 0,
        in_context: bool = False,
        written: list[str] | None = None,
    ) -> list[list[dict] | str]:
        """By case its readings as JSON, or why it cannot be read; see `read_cases`."""
        readable, plan = [name for name in names if self._reasons[name] is None], self.plan
        asked = {"fluency": texts and plan.fluency, "generate": plan.generate, "seed": seed, "in_context": in_context}
        cases = [self.cases[name] for name in readable]
        readings = read_compared(self.lm, cases, self.stack_before, **asked, written=written)
        found = dict(zip(readable, readings, strict=True))
        if self.lm.patches == self.stack_before and texts and not in_context:
            self._reasons |= {name: reason for name, reason in found.items() if isinstance(reason, str)}
            self._unsure -= {*names}
        each = [found[name] if name in found else self._reasons[name] or "" for name in names]
        return [one if isinstance(one, str) else [reading.to_json() for reading in one] for one in each]

    def write(self, patches: Mapping[str, Patch], seed: int) -> dict[str, list[str]]:
        """The sampled texts of those cases that can be written together, each with its patch on."""
        if not self.plan.fluency or len(patches) < 2:
            return {}
        found = sample_side_by_side(self.lm, [self.cases[name] for name in patches], [*patches.values()], seed)
        return {name: texts for name, texts in zip(patches, found, strict=True) if texts is not None}

    def compare_with(self) -> HeldOut | None:
        """The held-out texts, where there are any, as the unedited model reads them."""
        if self.held_out is None and self.plan.held_out:
            with self.lm.stacked(self.stack_before):
                self.held_out = HeldOut(self.lm, self.plan.held_out)
        return self.held_out

    def read_side(self) -> dict[str, float | None]:
        """What the model as it is now does to the held-out texts, and how far its weights have moved: fields of a
        row."""
        if (held_out := self.compare_with()) is None:
            return {"held_out_perplexity": None}
        perplexity, kl = held_out.read(self.lm)
        if self.weight_change is not None:
            change = self.weight_change.largest(self.lm)
        else:
            change = max(relative_norms(self.lm, self.lm.patches[len(self.stack_before) :]).values(), default=None)
        return {"held_out_perplexity": perplexity, "held_out_kl": kl, "weight_change": change}


@dataclass(frozen=True)
class Run:
    """Does tasks of a run: gives the rows that are not there yet, as they are made."""

    lm: LM
    cases: Mapping[str, Case]
    plan: Plan
    methods: Mapping[str, Method]
    reader: Reader
    folder: Path | None
    """Where patches are kept; None: nowhere."""

    def do(self, task: Task, there: Container[tuple]) -> Generator[dict[str, Any], None, None]:
        """The rows of a task, as they are made.

        Args:
            there: keys of rows that are not made again. A batch is read whole where one of its rows is missing.
        """
        if all(key in there for key in task.keys(self.plan)):
            return
        if task.kind == "before":
            yield from self._read_before(task, there)
        elif task.kind == "in_context":
            yield from self._read(task, IN_CONTEXT, task.names, {}, there, texts=False)
        elif task.kind == "single":
            yield from self._edit_each(task, there)
        elif task.kind == "sequence":
            yield from self._edit_on(task, there)
        else:
            costs = dict.fromkeys(task.names, Cost(error=None)) | self._unread_costs(task.names)
            yield from self._read(task, END, task.names, costs, there, texts=True)

    def _read_before(self, task: Task, there: Container[tuple]) -> Iterator[dict[str, Any]]:
        readings, held_out = self.reader.read(task.names, texts=True), self.reader.compare_with()
        side = {"held_out_perplexity": None if held_out is None else held_out.perplexity}
        for name, found in zip(task.names, readings, strict=True):
            if (name,) not in there:
                edit = {key: v for key, v in to_json(self.cases[name].edit).items() if v or v == ""}
                found = [] if isinstance(found, str) else found
                yield {"case": name, "edit": edit, **side, "readings": found}

    def _edit_each(self, task: Task, there: Container[tuple]) -> Iterator[dict[str, Any]]:
        """Every case by itself; the patch comes off before the next. Where that is faster, many are computed at a
        time."""
        names, method = task.names, self._method(task)
        unread = self._unread_costs(names)
        readable = [name for name in names if name not in unread]
        with self.lm.progress.stage(f"{task.label}, {names[0] if len(names) == 1 else f'{names[0]} to {names[-1]}'}"):
            found = attempt_each(self.lm, method, [self.cases[name].edits for name in readable])
        patches = {name: [patch] for name, (patch, _) in zip(readable, found, strict=True) if patch is not None}
        costs = {name: case_cost(each) for name, (_, each) in zip(readable, found, strict=True)} | unread
        written: dict[str, list[str]] = {}
        if not all(self._key(task, AFTER_EDIT, name) in there for name in patches):
            written = self.reader.write({name: own[0] for name, own in patches.items()}, task.seed)
        for name in names:
            with self.lm.patched(*patches.get(name, [])):
                for stage in single_stages(task.label, self.plan):
                    texts = stage != IN_CONTEXT
                    own = written.get(name) if texts else None
                    yield from self._read(task, stage, (name,), costs, there, texts=texts, written=own)

    def _edit_on(self, task: Task, there: Container[tuple]) -> Iterator[dict[str, Any]]:
        """Patch upon patch; in batch mode a single one. The patches of a killed run are put on again."""
        names, plan, method = task.names, self.plan, self._method(task)
        unread = self._unread_costs(names)
        size = len(names) if plan.mode == "batch" else plan.batch_size
        folder = None if self.folder is None else self.folder / task.place
        costs: dict[str, Cost] = {}
        with self.lm.stacked(self.lm.patches):
            for start in range(0, len(names), size):
                chunk = names[start : start + size]
                file = None if folder is None else folder / f"{start:06d}.patch"
                with self.lm.progress.stage(f"{task.label}, from edit {start + 1}"):
                    costs |= self._apply_patch(method, chunk, unread, file)
                if plan.mode == "sequential":
                    texts = bool(plan.fluency_every) and start // size % plan.fluency_every == 0
                    yield from self._read(task, AFTER_EDIT, chunk, costs, there, texts=texts)
                if len(costs) in plan.checkpoints and len(costs) < len(names):
                    yield from self._read(task, checkpoint(len(costs)), [*costs], costs, there, texts=True)
            yield from self._read(task, END, names, costs, there, texts=True)

    def _method(self, task: Task) -> Method:
        """The task's method with its seed, where it has one."""
        method = self.methods[task.label]
        return replace(cast(Any, method), seed=task.seed) if "seed" in field_values(method) else method

    def _apply_patch(
        self, method: Method, names: Sequence[str], unread: Mapping[str, Cost], file: Path | None
    ) -> dict[str, Cost]:
        """Puts the patch of these cases on, if there is any, but for those in `unread`; gives what each cost."""
        edits = {name: self.cases[name].edits for name in names if name not in unread}
        asked = {replace(edit, id=None): edit for group in edits.values() for edit in group}  # each once
        patch, costs = attempt(self.lm, method, list(asked.values()), file)
        if patch is not None:
            self.lm.apply(patch)
        cost_of = dict(zip(asked, costs, strict=True))
        found = {name: case_cost([cost_of[replace(e, id=None)] for e in group]) for name, group in edits.items()}
        return {name: unread[name] if name in unread else found[name] for name in names}

    def _unread_costs(self, names: Sequence[str]) -> dict[str, Cost]:
        """The costs of the cases that the base cannot read, which are not edited."""
        return {name: Cost(error=reason) for name, reason in self.reader.unreadable(names).items()}

    def _key(self, task: Task, stage: str, name: str) -> tuple:
        return task.label, task.seed, self.plan.mode, stage, name

    def _read(
        self,
        task: Task,
        stage: str,
        names: Sequence[str],
        costs: Mapping[str, Cost],
        there: Container[tuple],
        *,
        texts: bool,
        written: list[str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Reads the cases on the model as it is, and gives the rows that are missing.

        Args:
            costs: what the cases cost; of the unedited model there are none.
            texts: with what the plan asks of texts.
            written: those of the one case that is read, where they are there already.
        """
        side: dict[str, float | None] = {} if texts else {"held_out_perplexity": None}
        for block in blocks(names):
            missing = {name for name in block if self._key(task, stage, name) not in there}
            if not missing:
                continue
            options = {"texts": texts, "seed": task.seed, "in_context": stage == IN_CONTEXT}
            readings = self.reader.read(block, **options, written=written)
            side = side or self.reader.read_side()  # of the model, whatever the cases
            for name, found in zip(block, readings, strict=True):
                about = {"case": name, "method": task.label, "seed": task.seed, "mode": self.plan.mode}
                cost = costs[name].to_json() if costs else {"error": None}
                if isinstance(found, str):
                    cost, found = {**cost, "error": found if costs else None}, []
                if name in missing:
                    yield {**about, "stage": stage, **cost, **side, "readings": found}
