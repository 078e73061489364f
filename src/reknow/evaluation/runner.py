"""Runs methods over cases: `evaluate` in memory, `bench` in a folder from which a killed run resumes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import reknow
from reknow.checks.bounds import Natural, Number, Seed, check_settings
from reknow.contract import Method
from reknow.edits import Case, cases_digest, to_json
from reknow.errors import InputError
from reknow.evaluation.editing import edit_each, edit_once
from reknow.evaluation.probing import perplexity, read_each
from reknow.evaluation.results import Results
from reknow.evaluation.run_folder import (
    BEFORE_FILE,
    BEFORE_KEY,
    IN_CONTEXT,
    ROW_KEY,
    ROWS_FILE,
    UNEDITED,
    BeforeRow,
    CaseRow,
    method_settings,
    own_rows,
    run_digest,
)
from reknow.files.json_lines import Rows
from reknow.files.locks import write_lock
from reknow.files.manifest import open_manifest
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.readable import find_unreadable
from reknow.progress import progress_bar

Mode = Literal["single", "batch", "sequential"]
"""Each case on the unedited model; all in one patch; one after the other, all kept."""

_BLOCK = 32
"""Cases that are read together. Fixed, so that a resumed run asks the same questions in the same batches."""


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises InputError where there is none, or one twice."""
    if len(set(seeds)) != len(seeds) or not seeds:
        raise InputError(f"expected at least one seed, each once; got {list(seeds)}: correct them")


@dataclass(frozen=True)
class Plan:
    """How the cases are edited and read, whatever the method."""

    mode: Mode = "single"
    """Each case on the unedited model (single), all in one patch (batch), or one after the other (sequential)."""
    batch_size: Number = 1
    """Cases whose edits a patch of a sequence makes."""
    checkpoints: tuple[Number, ...] = ()
    """After how many edits of a sequence all earlier ones are read again; after all of them always."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of the methods and of the sampled texts: a run for each."""
    fluency: bool = False
    """Sample text for fluency, where the cases have prompts for it: most of a run's time goes there."""
    generate: bool = True
    """Let the model write its answers too. Without, a run is several times faster, and teacher-forced only."""
    held_out: tuple[str, ...] = ()
    """Texts whose perplexity is taken where fluency is, sampled or not."""
    fluency_every: Natural = 0
    """Patches of a sequence from one right after which text is sampled to the next; 0: at the checkpoints only."""
    in_context: tuple[str, ...] = ()
    """Labels of methods after whose single edits every question is also asked with the edit in front, as of the
    unedited model: what knowing it would give."""

    def __post_init__(self):
        check_settings(self)
        check_seeds(self.seeds)
        wrong = [at for at in self.checkpoints if at % self.batch_size]
        if wrong or (self.checkpoints and self.mode != "sequential"):
            raise InputError(
                "expected checkpoints of a sequential run, at multiples of its batch size; "
                f"got {list(self.checkpoints)} in mode {self.mode} with batch size {self.batch_size}: change them"
            )
        if self.batch_size > 1 and self.mode != "sequential":
            raise InputError(
                f"expected a batch size in sequential mode only; got {self.batch_size} in mode {self.mode}: leave it "
                "out, or make the run sequential"
            )
        if self.in_context and self.mode != "single":
            raise InputError(f"expected in_context in single mode only; got mode {self.mode}: change them")


@typed_exclusively
def evaluate(
    lm: LM, cases: Sequence[Case], method: Method, plan: Plan = Plan(), *, progress: bool = False
) -> Results:
    """Edits the cases with a method and reads their probes before and after; nothing is written to disk.

    What cannot be made or read counts as failed, as in `bench`, whose runs can be resumed. The model is the same
    afterwards.
    """
    methods = {method.name: method.resolve(lm)}
    run = _Run(lm, _by_id(cases), plan, Rows(None, BEFORE_KEY), Rows(None, ROW_KEY))
    run.run_all(methods, progress)
    return Results({**_about(lm), "settings": _settings(lm, cases, methods, plan, "")}, run.before, run.rows)


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
    progress: bool = False,
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
        _Run(lm, named, plan, before, rows, folder).run_all(labelled, progress)
    return Results(manifest, *own_rows(manifest, before, rows, named, folder))


class _Run:
    """The loops of a run. What is in the rows already is not done again."""

    def __init__(
        self, lm: LM, cases: dict[str, Case], plan: Plan, before: Rows, rows: Rows, folder: Path | None = None
    ):
        self.lm, self.cases, self.plan = lm, cases, plan
        self.before, self.rows, self.folder = before, rows, folder
        self.unedited = lm.patches
        found = find_unreadable(lm, list(cases.values()), in_context=bool(plan.in_context))
        self.unreadable = {name: reason for name, reason in zip(cases, found, strict=True) if reason is not None}
        self.advance: Callable[[], object] = lambda: None
        self.report: Callable[[str], object] = lambda text: None

    def run_all(self, methods: Mapping[str, Method], progress: bool) -> None:
        for method in methods.values():
            _refuse_seen(method, self.lm, self.cases.values())
        stages = 2 + len(self.plan.checkpoints) if self.plan.mode == "sequential" else 1
        readings = stages * len(methods) + len(set(self.plan.in_context) & set(methods))
        steps = len(self.cases) * (1 + bool(self.plan.in_context) + len(self.plan.seeds) * readings)
        done = len(self.before) + len(self.rows)
        with progress_bar(progress, "cases read", steps, done) as (self.advance, self.report):
            self.read_before()
            for label, method in methods.items():
                for seed in self.plan.seeds:
                    run = self.run_single if self.plan.mode == "single" else self.run_sequence
                    seeded = any(field.name == "seed" for field in fields(method))  # type: ignore[arg-type]
                    run(label, replace(method, seed=seed) if seeded else method, seed)  # type: ignore[type-var]

    def read_before(self) -> None:
        for names in _blocks(list(self.cases)):
            if not all((name,) in self.before for name in names):
                readings, held_out = self.read(names, texts=True), self.read_held_out()
                for name, found in zip(names, readings, strict=True):
                    if isinstance(found, str):
                        self.unreadable[name], found = found, []
                    edit = {key: v for key, v in to_json(self.cases[name].edit).items() if v or v == ""}
                    self.before.add({"case": name, "edit": edit, "held_out_perplexity": held_out, "readings": found})
                    self.advance()
        if self.plan.in_context:
            nothing = {name: {"error": None} for name in self.cases}
            self.add_rows(UNEDITED, self.plan.seeds[0], IN_CONTEXT, nothing, texts=False)

    def run_single(self, label: str, method: Method, seed: int) -> None:
        """Every case by itself; the patch comes off before the next. Where that is faster, many are computed at a
        time."""
        stages = ["after_edit", IN_CONTEXT] if label in self.plan.in_context else ["after_edit"]
        for names in _blocks(list(self.cases), method.edits_per_call):
            if all(self.is_done(label, seed, stage, names) for stage in stages):
                continue
            about = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            makeable = [name for name in names if name not in self.unreadable]
            with self.lm.progress.reported_to(lambda text, about=about: self.report(f"{label}, {about}: {text}")):
                found = edit_each(self.lm, method, [self.cases[name].edits for name in makeable])
            made = dict(zip(makeable, found, strict=True))
            for name in names:
                patch, costs = made.get(name, (None, []))
                with self.lm.patched(*filter(None, [patch])):
                    for stage in stages:
                        cost = {name: self.case_cost(name, costs)}
                        self.add_rows(label, seed, stage, cost, texts=stage != IN_CONTEXT)

    def run_sequence(self, label: str, method: Method, seed: int) -> None:
        """Patch upon patch; in batch mode a single one. The patches of a killed run are put on again."""
        names, plan = list(self.cases), self.plan
        if self.is_done(label, seed, "end", names):
            return
        size = len(names) if plan.mode == "batch" else plan.batch_size
        folder = None if self.folder is None else self.folder / "patches" / f"{quote(label, safe='')}-{seed}"
        costs: dict[str, dict] = {}
        with self.lm.stacked(self.unedited):
            for start in range(0, len(names), size):
                chunk = names[start : start + size]
                file = None if folder is None else folder / f"{start:06d}.patch"
                with self.lm.progress.reported_to(
                    lambda text, number=start: self.report(f"{label}, from edit {number + 1}: {text}")
                ):
                    now = self.apply_patch(method, chunk, file)
                costs |= now
                if plan.mode == "sequential":
                    texts = bool(plan.fluency_every) and start // size % plan.fluency_every == 0
                    self.add_rows(label, seed, "after_edit", now, texts=texts)
                if len(costs) in plan.checkpoints and len(costs) < len(names):
                    self.add_rows(label, seed, f"at:{len(costs)}", costs, texts=True)
            self.add_rows(label, seed, "end", costs, texts=True)

    def apply_patch(self, method: Method, names: list[str], file: Path | None) -> dict[str, dict]:
        """Puts the patch of these cases on, if there is any; what each cost."""
        readable = [name for name in names if name not in self.unreadable]
        asked = {replace(edit, id=None): edit for name in readable for edit in self.cases[name].edits}  # each once
        patch, costs = edit_once(self.lm, method, list(asked.values()), file)
        if patch is not None:
            self.lm.apply(patch)
        cost_of = dict(zip(asked, costs, strict=True))
        return {
            name: self.case_cost(name, [cost_of.get(replace(edit, id=None), {}) for edit in self.cases[name].edits])
            for name in names
        }

    def case_cost(self, name: str, costs: list[dict]) -> dict:
        """What a case cost, by its edits, all of which have to be made; none if the model cannot read it."""
        if name in self.unreadable:
            return {"error": self.unreadable[name]}
        return {**costs[0], "error": next((cost["error"] for cost in costs if cost["error"] is not None), None)}

    def is_done(self, label: str, seed: int, stage: str, names: Sequence[str]) -> bool:
        return all((label, seed, self.plan.mode, stage, name) in self.rows for name in names)

    def add_rows(self, label: str, seed: int, stage: str, costs: Mapping[str, dict], *, texts: bool) -> None:
        """Reads the cases on the model as it is and writes their rows; `texts`: with what the plan asks of texts."""
        for names in _blocks(list(costs)):
            if self.is_done(label, seed, stage, names):
                continue
            readings = self.read(names, texts=texts, seed=seed, in_context=stage == IN_CONTEXT)
            held_out = self.read_held_out() if texts else None
            for name, found in zip(names, readings, strict=True):
                about = {"case": name, "method": label, "seed": seed, "mode": self.plan.mode, "stage": stage}
                cost = costs[name]
                if isinstance(found, str):
                    cost, found = {**cost, "error": cost["error"] if label == UNEDITED else found}, []
                self.rows.add({**about, **cost, "held_out_perplexity": held_out, "readings": found})
                self.advance()

    def read(self, names: list[str], *, texts: bool, seed: int = 0, in_context: bool = False) -> list[list | str]:
        """By case its readings as JSON, or why it cannot be read."""
        cases = [self.cases[name] for name in names if name not in self.unreadable]
        plan, asked = self.plan, {"seed": seed, "in_context": in_context}
        fluency = texts and plan.fluency
        found = iter(read_each(self.lm, cases, self.unedited, fluency=fluency, generate=plan.generate, **asked))
        each = [self.unreadable[name] if name in self.unreadable else next(found) for name in names]
        return [one if isinstance(one, str) else [reading.to_json() for reading in one] for one in each]

    def read_held_out(self) -> float | None:
        """The perplexity of the held-out texts, where there are any."""
        return perplexity(self.lm, self.plan.held_out) if self.plan.held_out else None


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
        "methods": method_settings(methods),
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
