"""The studies of the articles that this library began with, sized for a model that others trained.

A size finishes within an hour on two idle cores with a model of 135M parameters (`demo:smollm2`): `minutes` says how
long that takes, by the seconds of single edits and readings (docs/studies.md). The presets of `bench` are the same
studies in the size of the bundled models, a twentieth as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from reknow.datasets.text import held_out_texts
from reknow.evaluation.plan import Plan
from reknow.studies.preset import Preset, Selection, Size, Variant, plain
from reknow.studies.presets import PRESETS

__all__ = ["ARTICLES", "Article", "sized"]


class Article(NamedTuple):
    """A study of an article: what it asks, and the runs that answer it."""

    question: str
    parts: Mapping[str, Preset]
    """Folder of each run under the study's → what is run; `""`: the study's own folder."""
    minutes: int
    """On two idle cores with `demo:smollm2`."""
    grows: bool = False
    """Whether its parts differ in how many edits hold at once, so that one page shows them by that number, with the
    perplexity of plain text."""


def sized(study: Article, limit: int | None = None, *, full: bool = False) -> Article:
    """The study in its full size, or over at most so many cases of each set; plain text is added where it is read."""
    return study._replace(parts={name: _sized(study, each, limit, full) for name, each in study.parts.items()})


def _sized(study: Article, preset: Preset, limit: int | None, full: bool) -> Preset:
    cases, plan = (preset.full or preset.size) if full else preset.size
    if limit is not None:
        most = limit if cases.limit is None else min(limit, cases.limit)
        cases = cases._replace(limit=most, limits={name: min(limit, own) for name, own in cases.limits.items()})
    if study.grows:
        plan = replace(plan, held_out=held_out_texts())
    return preset._replace(size=Size(cases, plan))


_KNOWEDIT = "wiki_recent,knowedit-zsre,wiki_counterfact,wikibio"


def _of(name: str, cases: Selection | None = None, plan: Plan | None = None, methods: tuple[str, ...] = ()) -> Preset:
    """A preset with other cases, another plan or some of its methods."""
    preset = PRESETS[name]
    some = tuple(variant for variant in preset.methods if not methods or variant.label in methods)
    full = preset.full or Size(preset.size.cases._replace(limit=None), preset.size.plan)
    return preset._replace(methods=some, size=Size(cases or preset.size.cases, plan or preset.size.plan), full=full)


def _growing(singles: tuple[str, ...], batches: tuple[str, ...], sequences: tuple[str, ...], edits: int):
    """Runs of CounterFact: edits each by itself, 10, 100 and 300 in one patch, and so many ten at a time."""

    parts = {"single": _of_counterfact(plain(*singles), Plan(generate=False), 10, 50)}
    if batches:
        batch = Plan("batch", generate=False)
        parts |= {f"batch-{limit}": _of_counterfact(plain(*batches), batch, limit) for limit in (10, 100, 300)}
    return {**parts, "sequence": _in_turns(plain(*sequences), edits)}


def _of_counterfact(methods: tuple[Variant, ...], plan: Plan, limit: int, more: int | None = None) -> Preset:
    """A run of so many cases, in its full size of more."""
    cases = Selection("counterfact", limit, probes_per_name=2)
    full = replace(plan, checkpoints=_CHECKPOINTS) if plan.checkpoints else plan
    return Preset("", methods, Size(cases, plan), Size(cases._replace(limit=more or limit), full))


def _in_turns(methods: tuple[Variant, ...], edits: int) -> Preset:
    """So many edits, in the full size 1,000, ten at a time."""
    checkpoints = tuple(at for at in _CHECKPOINTS if at < edits)
    plan = Plan("sequential", batch_size=10, checkpoints=checkpoints, generate=False)
    return _of_counterfact(methods, plan, edits, 1000)


_CHECKPOINTS = (10, 100, 300)
_IN_TURNS = ("betaedit", "evoedit", "memit-fe", "memit", "alphaedit", "sphere")
_MEMORIES = ("grace", "wise", "ike-zero", "serac")
_CONTINUAL = ("ice", "ft-m@article", "ft-l@article", "ft-m", "memit", "rome")

ARTICLES: dict[str, Article] = {
    "zsre": Article(
        "EasyEdit: editing against fine-tuning on ZsRE, single edits.",
        {"": _of("zsre-table", Selection("knowedit-zsre", 45, probes_per_name=2))},
        43,
    ),
    "ice-table": Article(
        "ICE, Table 1: single edits, against fine-tuning, ROME and MEMIT.",
        {"": _of("ice-table", Selection(f"{_KNOWEDIT},counterfact", 12, {"wikibio": 3}, probes_per_name=2))},
        27,
    ),
    "ice-ablation": Article("ICE, Tables 2 and 4: targets, contexts, sampling.", {"": _of("ice-ablation")}, 39),
    "ice-lambda": Article("ICE, Table 3: how much consistency.", {"": _of("ice-lambda")}, 19),
    "ice-continual": Article(
        "ICE, Table 5: 100 edits one after the other, all kept.",
        {
            "": _of(
                "ice-continual",
                Selection(_KNOWEDIT, 32, {"wikibio": 4}, probes_per_name=2, one_run=True),
                Plan("sequential", checkpoints=(50,), fluency=True, fluency_every=10),
                _CONTINUAL,
            )
        },
        60,
    ),
    "ice-convergence": Article(
        "ICE, Figures 2 and 3: losses by step, the consistency condition.", {"": _of("ice-convergence")}, 12
    ),
    "memories": Article(
        "Memories beside the weights under 1, 10, 100 and 300 edits.",
        _growing(_MEMORIES, (), _MEMORIES, 300),
        28,
        grows=True,
    ),
    "mass": Article(
        "1, 10, 100 and 300 edits in one patch, and 100 ten at a time (--full: 1,000).",
        _growing(("memit", "alphaedit", "rome"), ("memit",), ("memit", "alphaedit", "rome"), 100),
        22,
        grows=True,
    ),
    "sequences": Article(
        "What holds earlier edits, MEMIT and AlphaEdit: 100 edits, ten at a time (--full: 1,000).",
        {"sequence": _in_turns((Variant("memit@held", "memit", {"hold_earlier": True}), *plain(*_IN_TURNS)), 100)},
        25,
        grows=True,
    ),
}
"""Name → study."""
