"""Runs methods over cases: `evaluate` in memory, `bench` in a folder from which a killed run resumes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import reknow
from reknow.contract import Method, field_values, method_settings
from reknow.edits import Case, cases_digest, to_json
from reknow.errors import InputError
from reknow.evaluation.attempts import Cost, attempt, attempt_each, case_cost
from reknow.evaluation.plan import Plan
from reknow.evaluation.probing import perplexity, read_compared
from reknow.evaluation.results import Results
from reknow.evaluation.run_folder import (
    BEFORE_FILE,
    BEFORE_KEY,
    ROW_KEY,
    ROWS_FILE,
    BeforeRow,
    CaseRow,
    own_rows,
    run_digest,
)
from reknow.evaluation.side_by_side import sample_side_by_side
from reknow.evaluation.stages import AFTER_EDIT, END, IN_CONTEXT, UNEDITED, checkpoint
from reknow.files.json_lines import Rows
from reknow.files.locks import write_lock
from reknow.files.manifest import open_manifest
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.readable import find_unreadable
from reknow.patching.patches import Patch

_BLOCK = 32
"""Cases that are read together. Fixed, so that a resumed run asks the same questions in the same batches."""


@typed_exclusively
def evaluate(lm: LM, cases: Sequence[Case], method: Method, plan: Plan = Plan()) -> Results:
    """Edits the cases with a method and reads their probes before and after; nothing is written to disk.

    What cannot be made or read counts as failed, as in `bench`, whose runs can be resumed. The model is the same
    afterwards.
    """
    methods = {method.name: method.resolve(lm)}
    before, rows = Rows(None, BEFORE_KEY), Rows(None, ROW_KEY)
    _fill(lm, _by_id(cases), methods, plan, before, rows, None)
    return Results({**_about(lm), "settings": _settings(lm, cases, methods, plan, "")}, before, rows)


@typed_exclusively
def bench(
    lm: LM,
    cases: Sequence[Case],
    methods: Sequence[Method] | Mapping[str, Method],
    out: str | Path,
    *,
    dataset: str = "",
    plan: Plan = Plan(),
    refused: Sequence[str] = (),
) -> Results:
    """Compares methods on the same cases in a run folder; started again on that folder, it goes on where it was.

    The folder has `manifest.json` (what was run), `before.jsonl` (the unedited model's answers, read once for all
    methods and seeds), `cases.jsonl` (a line per method, seed, stage and case) and `patches/` (of sequences and
    batches; a finished run needs them no more).

    An edit that a method cannot make does not stop the run: its row says why under `error`, it counts as no success
    whatever the unedited model says, and a patch of many is made of the others. So with a case whose questions the
    model cannot read: it has no readings, and counts among the failed alone. Neither is tried again when the run is
    taken up. What concerns the whole run, such as a layer that the model does not have, stops it.

    Args:
        methods: methods, or label → method to tell two settings of one method apart.
        dataset: what to call the cases in the manifest.
        refused: why records of the data set could not become cases, for the results to say.

    Raises:
        InputError: the folder was started with other settings, two methods or two cases have one name, or another
            process writes there.
    """
    folder, named, labelled = Path(out), _by_id(cases), _by_label(methods, lm)
    with write_lock(folder):
        about = {**_about(lm), "refused": list(refused)}
        manifest = open_manifest(folder, _settings(lm, cases, labelled, plan, dataset), about)
        run = run_digest(manifest["settings"])
        before = Rows(folder / BEFORE_FILE, BEFORE_KEY, BeforeRow, run=run)
        rows = Rows(folder / ROWS_FILE, ROW_KEY, CaseRow, run=run)
        _fill(lm, named, labelled, plan, before, rows, folder)
    return Results(manifest, *own_rows(manifest, before, rows, named, folder))


def _fill(
    lm: LM,
    cases: dict[str, Case],
    methods: Mapping[str, Method],
    plan: Plan,
    before: Rows,
    rows: Rows,
    folder: Path | None,
) -> None:
    """Adds the rows that are missing, of the unedited model to `before` and of the methods to `rows`."""
    for method in methods.values():
        _refuse_seen(method, lm, cases.values())
    stages = 2 + len(plan.checkpoints) if plan.mode == "sequential" else 1
    readings = stages * len(methods) + len(set(plan.in_context) & set(methods))
    steps = len(cases) * (1 + bool(plan.in_context) + len(plan.seeds) * readings)
    reader = _Reader(lm, cases, plan)
    with lm.progress.stage("cases read", steps, done=len(before) + len(rows)) as advance:
        run = _Run(lm, cases, plan, reader, before, rows, folder, advance)
        run.read_before()
        for label, method in methods.items():
            for seed in plan.seeds:
                run_method = run.run_single if plan.mode == "single" else run.run_sequence
                run_method(label, _with_seed(method, seed), seed)


class _Reader:
    """Asks the questions of the cases, as far as the plan wants them."""

    def __init__(self, lm: LM, cases: dict[str, Case], plan: Plan):
        self.lm, self.cases, self.plan = lm, cases, plan
        self.stack_before = lm.patches
        found = find_unreadable(lm, list(cases.values()), in_context=bool(plan.in_context))
        self.unreadable = {name: reason for name, reason in zip(cases, found, strict=True) if reason is not None}

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

    def read_held_out(self) -> float | None:
        """The perplexity of the held-out texts, where there are any."""
        return perplexity(self.lm, self.plan.held_out) if self.plan.held_out else None


@dataclass(frozen=True)
class _Run:
    """The loops of a run. What is in the rows already is not done again."""

    lm: LM
    cases: dict[str, Case]
    plan: Plan
    reader: _Reader
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
                readings, held_out = self.reader.read(names, texts=True), self.reader.read_held_out()
                for name, found in zip(names, readings, strict=True):
                    if isinstance(found, str):
                        self.reader.unreadable[name], found = found, []
                    edit = {key: v for key, v in to_json(self.cases[name].edit).items() if v or v == ""}
                    self.before.add({"case": name, "edit": edit, "held_out_perplexity": held_out, "readings": found})
                    self.advance()
        if self.plan.in_context:
            self.add_rows(UNEDITED, self.plan.seeds[0], IN_CONTEXT, list(self.cases), {}, texts=False)

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
        for block in _blocks(names):
            if self.is_done(label, seed, stage, block):
                continue
            options = {"texts": texts, "seed": seed, "in_context": stage == IN_CONTEXT}
            readings = self.reader.read(block, **options, written=written)
            held_out = self.reader.read_held_out() if texts else None
            for name, found in zip(block, readings, strict=True):
                about = {"case": name, "method": label, "seed": seed, "mode": self.plan.mode, "stage": stage}
                cost = costs[name].to_json() if costs else {"error": None}
                if isinstance(found, str):
                    cost, found = {**cost, "error": found if costs else None}, []
                self.rows.add({**about, **cost, "held_out_perplexity": held_out, "readings": found})
                self.advance()


def _by_label(methods: Sequence[Method] | Mapping[str, Method], lm: LM) -> dict[str, Method]:
    """Methods as `lm` decides, by their label or name; raises InputError where there is none or one name twice."""
    labelled = dict(methods) if isinstance(methods, Mapping) else {method.name: method for method in methods}
    if len(labelled) != len(methods) or not labelled:
        raise InputError("expected methods with different names; got one twice, or none: give label → method")
    return {label: method.resolve(lm) for label, method in labelled.items()}


def _by_id(cases: Sequence[Case]) -> dict[str, Case]:
    """Cases by the id of their edit, or by their number."""
    named = {case.edit.id or str(number): case for number, case in enumerate(cases)}
    if not cases or len(named) < len(cases):
        raise InputError(
            f"expected cases whose edits have different ids; got {len(cases)} cases with {len(named)} ids: "
            "leave the ids out, or make them differ"
        )
    return named


def _settings(lm: LM, cases: Sequence[Case], methods: Mapping[str, Method], plan: Plan, dataset: str) -> dict:
    """What must be the same for two runs to belong together."""
    return {
        "reknow": reknow.__version__,
        "model": lm.fingerprint.digest,
        "patches": [patch.id for patch in lm.patches],
        "dataset": dataset,
        "cases": len(cases),
        "cases_digest": cases_digest(cases),
        "methods": {label: method_settings(method) for label, method in methods.items()},
        **asdict(plan),
    }


def _about(lm: LM) -> dict:
    return {"model": lm.name, "dtype": str(lm.dtype).removeprefix("torch.")}


def _refuse_seen(method: Method, lm: LM, cases: Collection[Case]) -> None:
    """Raises InputError where the method was trained on one of the cases, whose scores would mean nothing."""
    seen = method.seen(lm, [edit for case in cases for edit in case.edits])
    if seen:
        raise InputError(
            f"expected cases on which the editor of {method.name} was not trained; it was on {len(seen)} of "
            f"{len(cases)}, such as {seen[0].id or seen[0].text!r}: evaluate on others, or train on others"
        )


def _blocks(names: list[str], size: int = _BLOCK) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _with_seed(method: Method, seed: int) -> Method:
    """The method with this seed, where it has one."""
    return replace(cast(Any, method), seed=seed) if "seed" in field_values(method) else method
