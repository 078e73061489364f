"""The loops of a run: ask the unedited model, edit, ask again, and add the rows that are missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from reknow.contract import Method
from reknow.edits import Case, to_json
from reknow.evaluation.attempts import Cost, attempt, attempt_each, case_cost
from reknow.evaluation.differences import WeightChange
from reknow.evaluation.held_out import HeldOut
from reknow.evaluation.plan import Plan
from reknow.evaluation.probing import read_compared
from reknow.evaluation.side_by_side import sample_side_by_side
from reknow.evaluation.soundness import relative_norms
from reknow.evaluation.stages import AFTER_EDIT, END, IN_CONTEXT, UNEDITED, checkpoint
from reknow.files.json_lines import Rows
from reknow.lm import LM
from reknow.model.readable import find_unreadable
from reknow.patching.patches import Patch

__all__ = ["Reader", "Run"]

_BLOCK = 32
"""Cases that are read together. Fixed, so that a resumed run asks the same questions in the same batches."""


class Reader:
    """Asks the questions of the cases, as far as the plan wants them.

    Attributes:
        held_out: the held-out texts, once the model that edits are compared with has read them.
        weight_change: of a model that somebody else edited, where its base's weights are known.
    """

    def __init__(
        self,
        lm: LM,
        cases: dict[str, Case],
        plan: Plan,
        held_out: HeldOut | None = None,
        weight_change: WeightChange | None = None,
    ):
        self.lm, self.cases, self.plan = lm, cases, plan
        self.stack_before = lm.patches
        found = find_unreadable(lm, list(cases.values()), in_context=bool(plan.in_context))
        self.unreadable = {name: reason for name, reason in zip(cases, found, strict=True) if reason is not None}
        self.held_out, self.weight_change = held_out, weight_change

    def read(
        self,
        names: list[str],
        *,
        texts: bool,
        seed: int = 0,
        in_context: bool = False,
        written: list[str] | None = None,
    ) -> list[list[dict] | str]:
        """By case its readings as JSON, or why it cannot be read; see `read_cases`."""
        cases, plan = [self.cases[name] for name in names if name not in self.unreadable], self.plan
        asked = {"fluency": texts and plan.fluency, "generate": plan.generate, "seed": seed, "in_context": in_context}
        found = iter(read_compared(self.lm, cases, self.stack_before, **asked, written=written))
        each = [self.unreadable[name] if name in self.unreadable else next(found) for name in names]
        return [one if isinstance(one, str) else [reading.to_json() for reading in one] for one in each]

    def write(self, patches: Mapping[str, Patch], seed: int) -> dict[str, list[str]]:
        """The sampled texts of those cases that can be written together, each with its patch on."""
        if not self.plan.fluency or len(patches) < 2:
            return {}
        found = sample_side_by_side(self.lm, [self.cases[name] for name in patches], [*patches.values()], seed)
        return {name: texts for name, texts in zip(patches, found, strict=True) if texts is not None}

    def oracle_names(self) -> list[str]:
        """Cases that the unedited model is asked with the edit in front: those whose questions it can then read, and
        those that it cannot read at all, for which there is a row all the same."""
        if self.plan.in_context:  # then what is too long with the edit in front counts as unreadable
            return list(self.cases)
        found = find_unreadable(self.lm, list(self.cases.values()), in_context=True)
        pairs = zip(self.cases, found, strict=True)
        return [name for name, reason in pairs if reason is None or name in self.unreadable]

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
    """The loops of a run. What is in the rows already is not done again."""

    lm: LM
    cases: dict[str, Case]
    plan: Plan
    reader: Reader
    before: Rows
    rows: Rows
    folder: Path | None
    """Where patches are kept; None: nowhere."""
    advance: Callable[[], object]
    """Says that a case has been read."""

    def read_before(self) -> None:
        """Reads every case on the unedited model."""
        for names in _blocks(list(self.cases)):
            if not all((name,) in self.before for name in names):
                readings, held_out = self.reader.read(names, texts=True), self.reader.compare_with()
                for name, found in zip(names, readings, strict=True):
                    if isinstance(found, str):
                        self.reader.unreadable[name], found = found, []
                    edit = {key: v for key, v in to_json(self.cases[name].edit).items() if v or v == ""}
                    side = {"held_out_perplexity": None if held_out is None else held_out.perplexity}
                    self.before.add({"case": name, "edit": edit, **side, "readings": found})
                    self.advance()
        if self.plan.in_context or self.plan.oracle:
            self.add_rows(UNEDITED, self.plan.seeds[0], IN_CONTEXT, self.reader.oracle_names(), {}, texts=False)

    def run_single(self, label: str, method: Method, seed: int) -> None:
        """Every case by itself; the patch comes off before the next. Where that is faster, many are computed at a
        time."""
        stages = [AFTER_EDIT, IN_CONTEXT] if label in self.plan.in_context else [AFTER_EDIT]
        for names in _blocks(list(self.cases), method.edits_per_call):
            if all(self.is_done(label, seed, stage, names) for stage in stages):
                continue
            about = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            readable = [name for name in names if name not in self.reader.unreadable]
            with self.lm.progress.stage(f"{label}, {about}"):
                found = attempt_each(self.lm, method, [self.cases[name].edits for name in readable])
            patches = {name: [patch] for name, (patch, _) in zip(readable, found, strict=True) if patch is not None}
            costs = {name: case_cost(edit_costs) for name, (_, edit_costs) in zip(readable, found, strict=True)}
            costs |= self.unread_costs(names)
            left = [name for name in names if name in patches and not self.is_done(label, seed, AFTER_EDIT, [name])]
            written = self.reader.write({name: patches[name][0] for name in left}, seed)
            for name in names:
                with self.lm.patched(*patches.get(name, [])):
                    for stage in stages:
                        texts = stage != IN_CONTEXT
                        own = written.get(name) if texts else None
                        self.add_rows(label, seed, stage, [name], costs, texts=texts, written=own)

    def run_sequence(self, label: str, method: Method, seed: int) -> None:
        """Patch upon patch; in batch mode a single one. The patches of a killed run are put on again."""
        names, plan = list(self.cases), self.plan
        if self.is_done(label, seed, END, names):
            return
        size = len(names) if plan.mode == "batch" else plan.batch_size
        folder = None if self.folder is None else self.folder / "patches" / f"{quote(label, safe='')}-{seed}"
        costs: dict[str, Cost] = {}
        with self.lm.stacked(self.lm.patches):
            for start in range(0, len(names), size):
                chunk = names[start : start + size]
                file = None if folder is None else folder / f"{start:06d}.patch"
                with self.lm.progress.stage(f"{label}, from edit {start + 1}"):
                    costs |= self.apply_patch(method, chunk, file)
                if plan.mode == "sequential":
                    texts = bool(plan.fluency_every) and start // size % plan.fluency_every == 0
                    self.add_rows(label, seed, AFTER_EDIT, chunk, costs, texts=texts)
                if len(costs) in plan.checkpoints and len(costs) < len(names):
                    self.add_rows(label, seed, checkpoint(len(costs)), list(costs), costs, texts=True)
            self.add_rows(label, seed, END, names, costs, texts=True)

    def apply_patch(self, method: Method, names: list[str], file: Path | None) -> dict[str, Cost]:
        """Puts the patch of these cases on, if there is any; gives what each cost."""
        edits = {name: self.cases[name].edits for name in names if name not in self.reader.unreadable}
        asked = {replace(edit, id=None): edit for group in edits.values() for edit in group}  # each once
        patch, costs = attempt(self.lm, method, list(asked.values()), file)
        if patch is not None:
            self.lm.apply(patch)
        cost_of = dict(zip(asked, costs, strict=True))
        found = {name: case_cost([cost_of[replace(e, id=None)] for e in group]) for name, group in edits.items()}
        unread = self.unread_costs(names)
        return {name: unread[name] if name in unread else found[name] for name in names}

    def unread_costs(self, names: Sequence[str]) -> dict[str, Cost]:
        """The costs of the cases that the model cannot read, which are not edited."""
        reasons = self.reader.unreadable
        return {name: Cost(error=reasons[name]) for name in names if name in reasons}

    def is_done(self, label: str, seed: int, stage: str, names: Sequence[str]) -> bool:
        return all((label, seed, self.plan.mode, stage, name) in self.rows for name in names)

    def add_rows(
        self,
        label: str,
        seed: int,
        stage: str,
        names: list[str],
        costs: Mapping[str, Cost],
        *,
        texts: bool,
        written: list[str] | None = None,
    ) -> None:
        """Reads the cases on the model as it is and writes their rows.

        Args:
            costs: what the cases cost; of the unedited model there are none.
            texts: with what the plan asks of texts.
            written: those of the one case that is read, where they are there already.
        """
        side: dict[str, float | None] = {} if texts else {"held_out_perplexity": None}
        for block in _blocks(names):
            if self.is_done(label, seed, stage, block):
                continue
            options = {"texts": texts, "seed": seed, "in_context": stage == IN_CONTEXT}
            readings = self.reader.read(block, **options, written=written)
            side = side or self.reader.read_side()  # of the model, whatever the cases
            for name, found in zip(block, readings, strict=True):
                about = {"case": name, "method": label, "seed": seed, "mode": self.plan.mode, "stage": stage}
                cost = costs[name].to_json() if costs else {"error": None}
                if isinstance(found, str):
                    cost, found = {**cost, "error": found if costs else None}, []
                self.rows.add({**about, **cost, **side, "readings": found})
                self.advance()


def _blocks(names: list[str], size: int = _BLOCK) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]
