"""`reknow bench` and `score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.besides import Besides, measure_tasks, say_abilities
from reknow.cli.comparing import compare_methods, ready_methods, say_failed, say_run, say_share
from reknow.cli.inspecting import Base, Edited, check_two
from reknow.cli.options import DEMO, ChatOpening, Encoding, Model, NoStats, Opening, refuse_beside, whole_numbers
from reknow.cli.places import run_folder, run_place
from reknow.cli.reporting import write_run
from reknow.cli.spreading import Spreading
from reknow.cli.terminal import say, say_table, warn_of_records
from reknow.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from reknow.contract import Method
    from reknow.engine.jobs import Engine
    from reknow.evaluation import Plan
    from reknow.lm import LM
    from reknow.studies.comparison import LoadedSets
    from reknow.studies.preset import Preset, Variant

_LIMIT = 20


@dataclass(frozen=True)
class _Cases:
    """Which cases are edited."""

    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="NAME, NAME:FILE, or FILE of edits or in any published form; several with commas. [counterfact]",
        ),
    ] = None
    limit: Annotated[int | None, typer.Option("--limit", min=1, help=f"How many cases of a set. [{_LIMIT}]")] = None
    offset: Annotated[int, typer.Option("--offset", min=0, help="How many cases to pass over.")] = 0
    shuffle: Annotated[int | None, typer.Option("--shuffle", help="Seed to shuffle the cases with.")] = None
    encoding: Encoding = None
    known: Annotated[bool, typer.Option("--known", help="Only facts that the model knows.")] = False
    probes: Annotated[
        str | None, typer.Option("--probes", help="Further questions about facts of CounterFact: negation,reversal.")
    ] = None


@dataclass(frozen=True)
class _Reading:
    """How cases are edited and read, where a study is not followed."""

    mode: Annotated[str | None, typer.Option("--mode", help="single, batch or sequential. [single]")] = None
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Edits per patch.")] = None
    checkpoints: Annotated[
        str | None, typer.Option("--checkpoints", help="After how many edits of a sequence all are read again.")
    ] = None
    seeds: Annotated[str | None, typer.Option("--seeds", help="Numbers, with commas between. [0]")] = None
    fluency: Annotated[
        bool | None, typer.Option("--fluency/--no-fluency", help="Sample text, most of the time. [off]")
    ] = None
    generate: Annotated[
        bool | None, typer.Option("--generate/--no-generate", help="Let the model write its answers. [on]")
    ] = None

    def plan(self, study: Preset) -> Plan:
        """The study's plan with what is given in its place."""
        numbers = {
            "checkpoints": whole_numbers("--checkpoints", self.checkpoints),
            "seeds": whole_numbers("--seeds", self.seeds),
        }
        given = {name: value for name, value in (vars(self) | numbers).items() if value is not None}
        return replace(study.size.plan, **given)

    def refuse(self, what: str) -> None:
        """Raises InputError where anything is given beside `what`."""
        names = {"fluency": "--fluency or --no-fluency", "generate": "--generate or --no-generate"}
        given = {name: value is not None for name, value in vars(self).items()}
        refuse_beside(what, {names.get(name, f"--{name.replace('_', '-')}"): there for name, there in given.items()})


def bench(
    model: Model = DEMO,
    preset: Annotated[str | None, typer.Option("--preset", help="A published study; see --list-presets.")] = None,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="Say which there are.")] = False,
    full: Annotated[bool, typer.Option("--full", help="A preset in its full size: hours.")] = False,
    names: Annotated[
        str | None, typer.Option("--methods", help="NAME or LABEL=NAME, with commas between. [rome,ft-m]")
    ] = None,
    settings: Annotated[
        list[str], typer.Option("--set", help="FIELD=VALUE of all methods, or LABEL.FIELD=VALUE; repeatable.")
    ] = [],  # noqa: B006, typer copies it
    *,
    cases: _Cases,
    reading: _Reading,
    besides: Besides,
    spreading: Spreading,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder; else under runs/.")] = None,
    no_stats: NoStats = False,
    opening: ChatOpening,
) -> None:
    """Compare methods on a data set, in a run folder. The same command takes up a run that was killed."""
    from reknow.cli.settings import check_each_once
    from reknow.studies.ice.convergence import measure_convergence
    from reknow.studies.ice.presets import CONVERGENCE, ICE_PRESETS
    from reknow.studies.presets import PRESETS

    if out is not None:
        out = run_place(out, "bench", model)[""]
    if list_presets:
        refuse_beside("--list-presets", {"--preset": preset, "--data": cases.data, "--methods": names, "--out": out})
        return say_table(["preset", "study"], [[key, each.study] for key, each in PRESETS.items()])
    study = _study(preset, full, cases)
    plan = reading.plan(study)
    if preset == CONVERGENCE:
        reading.refuse(f"--preset {preset}")
        besides.refuse(f"--preset {preset}")
        spreading.refuse(f"--preset {preset}")
    chosen = _chosen(study, names, check_each_once(settings))
    opens = partial(_open_with, opening, model, statistics=not no_stats)
    with spreading.engine(opens, opening.device) as engine:
        one_patch = plan.mode == "batch" or plan.batch_size > 1
        loaded = _load(study, cases, engine if cases.known else None, one_patch=one_patch)
        chosen = ready_methods(engine, chosen, needed=names is not None)
        out = out or run_folder(preset or "+".join(loaded.sets), model)
        folders = run_place(out, "bench", model, loaded.sets)
        if preset == CONVERGENCE:
            edits = [case.edit for cases_of in loaded.sets.values() for case in cases_of]
            engine.ask(partial(measure_convergence, edits=edits, methods=chosen, out=out))
            return write_run(out)
        plan, shard = besides.plan(plan, folders.values(), default=preset is None), spreading.shard
        tasks = besides.tasks(plan.mode, loaded.sets.values(), opening.own_code, shared=shard is not None)
        runs = compare_methods(engine, loaded, chosen, plan, folders, shard, script_ppl_r=preset in ICE_PRESETS)
        measure_tasks(engine, [folders[name] for name in loaded.sets], tasks)
    if shard is not None:
        return say_share(shard, out, runs)
    write_run(out)
    for results in runs:
        results.refuse_lost()
    say_failed(runs)


def score(
    model: Edited,
    base: Base,
    *,
    cases: _Cases,
    generate: Annotated[
        bool, typer.Option(help="Let the models write their answers. [on]", show_default=False)
    ] = True,
    besides: Besides,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder; else under runs/.")] = None,
    opening: ChatOpening,
) -> None:
    """Score a model that somebody else edited as `bench` does: before is its base, and after is the model.

    The same command takes up a run that was killed.
    """
    from reknow.engine.jobs import Local
    from reknow.evaluation import Plan
    from reknow.evaluation import score as run
    from reknow.evaluation.ability import measure_given

    check_two(model, base)
    if out is not None:
        for source in (model, base):
            run_place(out, "score", source)
        out = out.expanduser()
    study = _study(None, False, cases)
    loaded = _load(study, cases, Local(opening.open(base)) if cases.known else None, one_patch=False)
    label = Path(model.rpartition(":")[2]).name
    out = out or run_folder(f"{label}-{'+'.join(loaded.sets)}", base)
    folders = run_place(out, "score", model, loaded.sets)
    opens = partial(opening.open, model), partial(opening.open, base)
    plan = besides.plan(Plan("batch", generate=generate), folders.values(), default=True)
    tasks = besides.tasks(plan.mode, [], opening.own_code)
    for name, chosen in loaded.sets.items():
        about = {"label": label, "dataset": name, "plan": plan, "refused": loaded.refused_of(name)}
        say_run(name, run(*opens, chosen, folders[name], **about), folders[name], len(loaded.sets))
        if tasks:
            measure_given(*opens, folders[name], tasks, label)
            say_abilities(folders[name])
    write_run(out)


def _study(preset: str | None, full: bool, cases: _Cases) -> Preset:
    """The preset, or ROME beside FT-M; with the data and the limit that are given."""
    from reknow.studies.preset import Preset, Selection, Size, plain
    from reknow.studies.presets import PRESETS

    data, limit = cases.data, cases.limit
    if preset is not None and preset not in PRESETS:
        raise did_you_mean("preset", preset, PRESETS)
    if full and preset is None:
        raise InputError("expected --full together with --preset; got no preset: name one, see --list-presets")
    ours = Preset("", plain("rome", "ft-m"), Size(Selection(limit=_LIMIT)))
    study = ours if preset is None else PRESETS[preset]
    size = study.full or study.size if full else study.size
    selection = size.cases
    if data is not None and preset is not None:
        own, given = set(selection.data.split(",")), {source.strip().partition(":")[0] for source in data.split(",")}
        if not given <= own:
            raise InputError(
                f"expected the data of the study {preset}, which are {', '.join(sorted(own))}, or files of theirs; "
                f"got {data}: name a part of them, as SET or SET:FILE, or leave --preset out"
            )
    if data is not None:
        selection = selection._replace(data=data)
    if limit is not None:
        limits = {name: min(limit, most) for name, most in selection.limits.items()}
        selection = selection._replace(limit=limit, limits=limits)
    return study._replace(size=size._replace(cases=selection))


def _chosen(study: Preset, names: str | None, settings: Sequence[str]) -> dict[str, Method]:
    """Label → method: those named, else the study's, with its settings and then the given ones."""
    own = {variant.label: variant for variant in study.methods}
    wanted = list(study.methods)
    if names is not None:
        wanted = [
            own[variant.label]
            if variant.label in own and variant.method in (variant.label, own[variant.label].method)
            else variant
            for variant in read_variants(names.split(","))
        ]
    return methods_by_label(wanted, settings)


def _open_with(opening: Opening, model: str, *, statistics: bool) -> LM:
    lm = opening.open(model)
    lm.computes_statistics = statistics
    return lm


def _load(study: Preset, selected: _Cases, knowing: Engine | None, *, one_patch: bool) -> LoadedSets:
    """The study's cases; says what was left out."""
    from reknow.studies.comparison import load_sets

    chosen = {"offset": selected.offset, "shuffle": selected.shuffle, "encoding": selected.encoding}
    more = [kind.strip() for kind in selected.probes.split(",")] if selected.probes else []
    loaded = load_sets(study.size.cases, knowing, one_patch=one_patch, probes=more, **chosen)
    for sentences in loaded.refused.values():
        warn_of_records(sentences)
    for name, count in loaded.conflicting.items():
        say(f"left out: {count} cases of {name} that contradict an earlier one")
    return loaded


def read_variants(names: Sequence[str]) -> list[Variant]:
    """Methods given as NAME or LABEL=NAME."""
    from reknow.studies.preset import Variant

    pairs = [[part.strip() for part in name.partition("=")[::2]] for name in names]
    if not all(label for label, _ in pairs):
        raise InputError("expected NAME or LABEL=NAME with commas between; got an empty label: fill it in or drop it")
    return [Variant(label, name or label) for label, name in pairs]


def methods_by_label(variants: Sequence[Variant], settings: Sequence[str]) -> dict[str, Method]:
    """Label → method; a setting `label.field=value` goes to that one, any other to all."""
    from reknow.cli.settings import build_method

    labels = [variant.label for variant in variants]
    if len(set(labels)) < len(labels):
        raise InputError(f"expected different labels; got {', '.join(labels)}: rename one")
    owners = [setting.partition("=")[0].rpartition(".")[0] for setting in settings]
    for owner in owners:
        if owner and owner not in labels:
            raise did_you_mean("method of a setting", owner, labels)
    pairs_of = {
        label: [
            s.removeprefix(f"{label}.") for s, owner in zip(settings, owners, strict=True) if owner in ("", label)
        ]
        for label in labels
    }
    return {label: build_method(name, pairs_of[label], given=given) for label, name, given in variants}
