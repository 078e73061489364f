"""Runs methods over cases: `evaluate` in memory, `bench` in a folder from which a killed run resumes.

`score` does the same to a model that somebody else edited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import reknow
from reknow.contract import Method, field_values, method_settings
from reknow.edits import Case, cases_digest
from reknow.errors import InputError
from reknow.evaluation.attempts import Cost
from reknow.evaluation.differences import WeightChange, read_and_close
from reknow.evaluation.held_out import HeldOut
from reknow.evaluation.plan import Plan
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
from reknow.evaluation.run_loops import Reader, Run
from reknow.evaluation.stages import END
from reknow.files.json_lines import Rows
from reknow.files.locks import write_lock
from reknow.files.manifest import open_manifest
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.fingerprint import weight_bits

_LATER = ("oracle",)
"""Fields of a plan that manifests have where they are set: those of earlier versions do not know them."""


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
        before, rows = _open_rows(folder, manifest)
        _fill(lm, named, labelled, plan, before, rows, folder)
    return Results(manifest, *own_rows(manifest, before, rows, named, folder))


def score(
    open_edited: Callable[[], LM],
    open_base: Callable[[], LM],
    cases: Sequence[Case],
    out: str | Path,
    *,
    label: str,
    dataset: str = "",
    plan: Plan = Plan("batch"),
    refused: Sequence[str] = (),
) -> Results:
    """Scores a model that somebody else edited, in a run folder as `bench` has it: before is its base, and the cases'
    edits count as made together. Started again on that folder, it goes on where it was.

    One of the models is in memory at a time, since the base's readings are kept in the folder. What needs both at
    once is not measured: fluency, and ConvSent's divergence on other topics. Of held-out texts the base's predictions
    are kept (`HeldOut`), for the size of the change what differs of its weights (`WeightChange`).

    Args:
        open_edited, open_base: open the models; the edited one is opened twice.
        label: what to call the edited model.
        plan: in batch mode with one seed: whether the models write their answers, held-out texts, the oracle.
        dataset, refused: as for `bench`.

    Raises:
        InputError: a plan of another kind, the models have different tokenizers, the folder was started with other
            settings or models, two cases have one name, or another process writes there.
    """
    if plan.mode != "batch" or len(plan.seeds) > 1:
        raise InputError(f"expected a plan in batch mode with one seed; got {plan.mode}, {plan.seeds}: change it")
    folder, named = Path(out), _by_id(cases)
    given, change = read_and_close(open_edited, lambda lm: (_describe_given(lm), WeightChange(lm)))

    def read_base(lm: LM) -> tuple[dict[str, Any], Rows, Rows, HeldOut | None]:
        if lm.fingerprint.tokenizer != given["tokenizer"]:
            raise InputError(
                f"expected the tokenizer of the base {lm.name}, by whose tokens answers are compared; "
                f"{given['source']} has another: name the base that it was made from, or one for both (--tokenizer)"
            )
        settings = _settings(lm, cases, {}, plan, dataset) | {"methods": {label: given}}
        manifest = open_manifest(folder, settings, {**_about(lm), "refused": list(refused)})
        before, rows = _open_rows(folder, manifest)
        reader = Reader(lm, named, plan)
        with lm.progress.stage("cases read", len(named) * (1 + plan.oracle), done=len(before)) as advance:
            Run(lm, named, plan, reader, before, rows, folder, advance).read_before()
        if plan.held_out:
            change.keep(lm)
        return manifest, before, rows, reader.compare_with()

    def read_edited(lm: LM) -> None:
        reader = Reader(lm, named, plan, kept, change)
        with lm.progress.stage("cases read", len(named)) as advance:
            run = Run(lm, named, plan, reader, before, rows, folder, advance)
            costs = dict.fromkeys(named, Cost(error=None)) | run.unread_costs([*named])
            run.add_rows(label, plan.seeds[0], END, [*named], costs, texts=True)

    with write_lock(folder):
        manifest, before, rows, kept = read_and_close(open_base, read_base)
        read_and_close(open_edited, read_edited)
    return Results(manifest, *own_rows(manifest, before, rows, named, folder))


def _open_rows(folder: Path, manifest: Mapping[str, Any]) -> tuple[Rows, Rows]:
    """The rows of the run that a folder has: of the unedited model, and of the others."""
    run = run_digest(manifest["settings"])
    before = Rows(folder / BEFORE_FILE, BEFORE_KEY, BeforeRow, run=run)
    return before, Rows(folder / ROWS_FILE, ROW_KEY, CaseRow, run=run)


def _describe_given(lm: LM) -> dict[str, str]:
    """What tells a model from others: the bits of its weights, the patches on it, its tokenizer."""
    content = [weight_bits(lm.model), [patch.id for patch in lm.patches]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return {"source": lm.name, "content": digest, "tokenizer": lm.fingerprint.tokenizer}


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
    steps = len(cases) * (1 + bool(plan.in_context or plan.oracle) + len(plan.seeds) * readings)
    reader = Reader(lm, cases, plan)
    with lm.progress.stage("cases read", steps, done=len(before) + len(rows)) as advance:
        run = Run(lm, cases, plan, reader, before, rows, folder, advance)
        run.read_before()
        for label, method in methods.items():
            for seed in plan.seeds:
                run_method = run.run_single if plan.mode == "single" else run.run_sequence
                run_method(label, _with_seed(method, seed), seed)


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
    planned = {name: value for name, value in asdict(plan).items() if name not in _LATER or value}
    return {
        "reknow": reknow.__version__,
        "model": lm.fingerprint.digest,
        "patches": [patch.id for patch in lm.patches],
        "dataset": dataset,
        "cases": len(cases),
        "cases_digest": cases_digest(cases),
        "methods": {label: method_settings(method) for label, method in methods.items()},
        **planned,
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


def _with_seed(method: Method, seed: int) -> Method:
    """The method with this seed, where it has one."""
    return replace(cast(Any, method), seed=seed) if "seed" in field_values(method) else method
