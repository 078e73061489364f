"""Runs methods over cases: `evaluate` in memory, `bench` in a folder from which a killed run resumes.

`score` does the same to a model that somebody else edited.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import reknow
from reknow.contract import Method
from reknow.edits import Case, cases_digest
from reknow.engine.jobs import Engine, Local
from reknow.engine.shards import Shard
from reknow.errors import InputError
from reknow.evaluation.differences import WeightChange, read_and_close
from reknow.evaluation.held_out import HeldOut
from reknow.evaluation.plan import Plan
from reknow.evaluation.results import Results
from reknow.evaluation.run_folder import BEFORE_KEY, ROW_KEY
from reknow.evaluation.run_loops import Reader, Run
from reknow.evaluation.run_parts import OpenRun, open_run
from reknow.evaluation.tasks import Task, blocks, list_tasks
from reknow.files.json_lines import Rows
from reknow.files.locks import write_lock
from reknow.lm import LM
from reknow.model.exclusive import typed_exclusively
from reknow.model.fingerprint import weight_bits
from reknow.model.readable import find_unreadable
from reknow.progress import progress
from reknow.registry import method_settings

_LATER = ("oracle",)
"""Fields of a plan that manifests have where they are set: those of earlier versions do not know them."""


@dataclass(frozen=True)
class CaseJob:
    """Cases that methods edit, and how they are read."""

    cases: Mapping[str, Case]
    methods: Mapping[str, Method]
    plan: Plan
    reader: Reader | None = None
    """Who asks, where that is known already."""

    def begin(self, lm: LM, folder: Path | None) -> Run:
        reader = self.reader or Reader(lm, self.cases, self.plan)
        return Run(lm, self.cases, self.plan, self.methods, reader, folder)

    def keys(self, task: Task) -> list[tuple]:
        return task.keys(self.plan)


@typed_exclusively
def evaluate(lm: LM, cases: Sequence[Case], method: Method, plan: Plan = Plan()) -> Results:
    """Edits the cases with a method and reads their probes before and after; nothing is written to disk.

    What cannot be made or read counts as failed, as in `bench`, whose runs can be resumed. The model is the same
    afterwards.
    """
    named = _by_id(cases)
    plan.warn_of_unreached(len(cases))
    start = _prepare(lm, cases, [method], plan, "", ())
    run = OpenRun({**start.about, "settings": start.settings}, Rows(None, BEFORE_KEY), Rows(None, ROW_KEY))
    tasks = list_tasks([*named], start.about["together"], plan, start.about["oracle"])
    _fill(Local(lm), CaseJob(named, start.methods, plan), tasks, run, None)
    return Results(run.manifest, run.before, run.rows)


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
    shard: str | None = None,
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
        shard: `I/N`, to make every N-th task alone, from the I-th on, in files of its own of the same folder, such as
            `cases.2-of-4.jsonl`. N processes may do so at one time; the results are those of what is there.

    Raises:
        InputError: the folder was started with other settings, two methods or two cases have one name, or another
            process writes there.
    """
    return bench_on(Local(lm), cases, methods, out, dataset=dataset, plan=plan, refused=refused, shard=shard)


def bench_on(
    engine: Engine,
    cases: Sequence[Case],
    methods: Sequence[Method] | Mapping[str, Method],
    out: str | Path,
    *,
    dataset: str = "",
    plan: Plan = Plan(),
    refused: Sequence[str] = (),
    shard: str | None = None,
) -> Results:
    """`bench`, whose tasks an engine does; its rows are those that one process makes, but for seconds and memory."""
    folder, named = Path(out), _by_id(cases)
    own = None if shard is None else Shard.parse(shard)
    plan.warn_of_unreached(len(cases))
    start = engine.ask(partial(_prepare, cases=cases, methods=methods, plan=plan, dataset=dataset, refused=refused))
    with open_run(folder, start.settings, start.about, own) as run:
        said = run.manifest if "names" in run.manifest else start.about
        tasks = list_tasks([*named], said["together"], plan, said["oracle"])
        tasks = tasks if own is None else own.share(tasks)
        _fill(engine, CaseJob(named, start.methods, plan), tasks, run, folder)
    return Results.of_run(run.manifest, run.before, run.rows, named, folder)


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
        open_edited: opens the edited model, which is done twice.
        open_base: opens its base.
        label: what to call the edited model.
        plan: in batch mode with one seed: whether the models write their answers, held-out texts, the oracle.
        dataset: as for `bench`.
        refused: as for `bench`.

    Raises:
        InputError: a plan of another kind, the models have different tokenizers, the folder was started with other
            settings or models, two cases have one name, or another process writes there.
    """
    if plan.mode != "batch" or len(plan.seeds) > 1:
        raise InputError(f"expected a plan in batch mode with one seed; got {plan.mode}, {plan.seeds}: change it")
    folder, named = Path(out), _by_id(cases)
    given, change = read_and_close(open_edited, lambda lm: (_describe_given(lm), WeightChange(lm)))

    def read_base(lm: LM) -> tuple[OpenRun, HeldOut | None]:
        if lm.fingerprint.tokenizer != given["tokenizer"]:
            raise InputError(
                f"expected the tokenizer of the base {lm.name}, by whose tokens answers are compared; "
                f"{given['source']} has another: name the base that it was made from, or one for both (--tokenizer)"
            )
        settings = _settings(lm, cases, {}, plan, dataset) | {"methods": {label: given}}
        about, reader = _about(lm, cases, {label: 1}, plan, refused), Reader(lm, named, plan)
        run = opened.enter_context(open_run(folder, settings, about))
        tasks = list_tasks(about["names"], {}, plan, about["oracle"])
        _fill(Local(lm), CaseJob(named, {}, plan, reader), tasks, run, folder)
        if plan.held_out:
            change.keep(lm)
        return run, reader.compare_with()

    def read_edited(lm: LM) -> None:
        job = CaseJob(named, {}, plan, Reader(lm, named, plan, kept, change))
        tasks = [Task("given", block, label, plan.seeds[0]) for block in blocks([*named])]
        _fill(Local(lm), job, tasks, run, folder)

    with write_lock(folder), ExitStack() as opened:
        run, kept = read_and_close(open_base, read_base)
        read_and_close(open_edited, read_edited)
    return Results.of_run(run.manifest, run.before, run.rows, named, folder)


def _describe_given(lm: LM) -> dict[str, str]:
    """What tells a model from others: the bits of its weights, the patches on it, its tokenizer."""
    content = [weight_bits(lm.model), [patch.id for patch in lm.patches]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return {"source": lm.name, "content": digest, "tokenizer": lm.fingerprint.tokenizer}


class _Start(NamedTuple):
    """What a run begins with."""

    methods: dict[str, Method]
    settings: dict[str, Any]
    about: dict[str, Any]


def _prepare(
    lm: LM,
    cases: Sequence[Case],
    methods: Sequence[Method] | Mapping[str, Method],
    plan: Plan,
    dataset: str,
    refused: Sequence[str],
) -> _Start:
    """The methods as this model decides them, and what the manifest says; refuses methods that saw the cases."""
    labelled = _by_label(methods, lm)
    for method in labelled.values():
        _refuse_seen(method, lm, cases)
    together = {label: method.edits_per_call for label, method in labelled.items()}
    return _Start(labelled, _settings(lm, cases, labelled, plan, dataset), _about(lm, cases, together, plan, refused))


def _fill(engine: Engine, job: CaseJob, tasks: Sequence[Task], run: OpenRun, folder: Path | None) -> None:
    """Adds the rows of the tasks that are missing."""
    keys = [key for task in tasks for key in job.keys(task)]
    with progress.stage("cases read", len(keys), done=sum(key in run for key in keys)) as advance:

        def keep(row: dict[str, Any]) -> None:
            run.add(row)
            advance()

        engine.perform(job, tasks, run, keep, folder)


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


def _about(lm: LM, cases: Sequence[Case], together: Mapping[str, int], plan: Plan, refused: Sequence[str]) -> dict:
    """What the manifest says besides, by which runs are not told apart."""
    return {
        "model": lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "refused": list(refused),
        "names": [*_by_id(cases)],
        "together": dict(together),
        "oracle": _oracle_names(lm, cases) if plan.oracle and not plan.in_context else None,
    }


def _oracle_names(lm: LM, cases: Sequence[Case]) -> list[str]:
    """Cases that the unedited model is asked with the edit in front: those whose questions it can read then, and
    those that it cannot read at all, for which there is a row all the same."""
    alone, behind = find_unreadable(lm, cases), find_unreadable(lm, cases, in_context=True)
    named = zip(_by_id(cases), alone, behind, strict=True)
    return [name for name, short, long in named if long is None or short is not None]


def _refuse_seen(method: Method, lm: LM, cases: Collection[Case]) -> None:
    """Raises InputError where the method was trained on one of the cases, whose scores would mean nothing."""
    seen = method.seen(lm, [edit for case in cases for edit in case.edits])
    if seen:
        raise InputError(
            f"expected cases on which the editor of {method.name} was not trained; it was on {len(seen)} of "
            f"{len(cases)}, such as {seen[0].id or seen[0].text!r}: evaluate on others, or train on others"
        )
