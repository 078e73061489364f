"""The article's studies (Zhang et al. 2024): editors that differ in one thing, trained alike and read on all tasks.

All are of one class, InstructEdit, with and without instructions, so nothing else differs: without, it is MEND on one
task, and on several the article's multi-task editor. Every task is seen equally often by every editor that learns it;
an editor of three tasks is trained for three times as many updates. Other methods can be read too; one that
learns is trained on the three tasks as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from reknow.checks.bounds import Natural, Number, Rank, Seed, check_settings
from reknow.contract import Method
from reknow.datasets.families import Family, load_families
from reknow.edits import Case
from reknow.errors import InputError, did_you_mean
from reknow.evaluation import Plan, Results, bench
from reknow.evaluation.plan import check_seeds
from reknow.evaluation.results import UNEDITED_BEFORE
from reknow.evaluation.stages import AFTER_EDIT, UNEDITED
from reknow.instructions.trial import FamilySplit, few_probes
from reknow.learning.learned import Learned
from reknow.lm import LM
from reknow.methods import method
from reknow.methods.instructedit import InstructEdit
from reknow.studies.instructedit.tables import write_tables

_AnyLearned = TypeVar("_AnyLearned", bound=Learned)

LEARNED, HELD_OUT = ("counterfact", "recent", "convsent"), "zsre"
TASKS = (*LEARNED, HELD_OUT)
_KEPT, _ALL = 1427, 14390
"""Of so many ConvSent entries to train on (EasyEdit's examples/KnowEdit.md) the article keeps so many (Figure 4d)."""


class Variant(NamedTuple):
    """An editor of a study: what it learns, and how it differs from the others."""

    label: str
    tasks: tuple[str, ...] = LEARNED
    settings: Mapping[str, object] = {}
    """Fields of InstructEdit that differ from its defaults."""
    unseen: bool = False
    """Read with the instructions that were kept out of training."""
    own_tasks: bool = False
    """One editor for each task, each read on its own task."""
    part_of_convsent: bool = False
    """Learns from no more of ConvSent than the article keeps of it to balance its tasks; see `part_of_convsent`."""


class Study(NamedTuple):
    """A question and the editors that answer it."""

    question: str
    variants: tuple[Variant, ...]
    reference: str
    """Label against which the gains are counted."""
    baselines: tuple[str, ...] = ()
    """Methods that are read too."""


_PLAIN, _BY_SIZE = {"instructed": False}, {"balanced": False}
SINGLE = Variant("single-task", settings=_PLAIN, own_tasks=True)
MULTI, INSTRUCT = Variant("multi-task", settings=_PLAIN), Variant("InstructEdit")
BY_SIZE = Variant("InstructEdit, by size", settings=_BY_SIZE)

STUDIES: dict[str, Study] = {
    "tasks": Study(
        "One editor for all tasks: what is lost, what do instructions win back? ZsRE is new to all of them.",
        (SINGLE, MULTI, INSTRUCT),
        "multi-task",
    ),
    "unseen": Study(
        "Instructions that were not trained on against those that were.",
        (INSTRUCT, Variant("InstructEdit, unseen instruction", unseen=True)),
        "InstructEdit",
    ),
    "scaling": Study(
        "One, two and three tasks to learn from.",
        (Variant("1 task", LEARNED[:1]), Variant("2 tasks", LEARNED[:2]), Variant("3 tasks", LEARNED)),
        "1 task",
    ),
    "balance": Study(
        "Tasks in turn, or as often as they have cases: all of ConvSent, or the part that the article keeps of it.",
        (
            INSTRUCT,
            BY_SIZE,
            Variant("InstructEdit, by size, part of ConvSent", settings=_BY_SIZE, part_of_convsent=True),
        ),
        BY_SIZE.label,
    ),
    "lengths": Study(
        "Every text alike in the loss, or every token: ConvSent's texts are long.",
        (
            Variant("InstructEdit, every token"),
            Variant("InstructEdit, every text", settings={"average_over": "texts"}),
        ),
        "InstructEdit, every token",
    ),
    "scale": Study(
        "Gradients as they are, or every token's scaled to length 1.",
        (INSTRUCT, Variant("InstructEdit, unit gradients", settings={"normalize_gradient": True})),
        "InstructEdit",
    ),
    "baselines": Study(
        "Methods that learn nothing, and KE after as many updates on the same tasks, against InstructEdit.",
        (INSTRUCT,),
        "InstructEdit",
        ("ft-l", "calinet", "grace", "ke"),
    ),
}


@dataclass(frozen=True)
class Budget:
    """How much is computed."""

    steps: Number = 100
    """Updates for each task that an editor learns."""
    batch_size: Number = 6
    rank: Rank = 64
    """Rank of the editors' networks."""
    test: int = 50
    """Cases of each task to read."""
    fluency: Natural = 10
    """Of these, after how many text is sampled for fluency, which takes as long as reading all."""
    seeds: tuple[Seed, ...] = (0,)

    def __post_init__(self):
        check_settings(self)
        check_seeds(self.seeds)


SMALL = Budget()


def run_study(
    lm: LM,
    name: str,
    out: str | Path,
    budget: Budget = SMALL,
    *,
    families: str | None = None,
    on_progress: Callable[[str], object] = lambda text: None,
) -> str:
    """Trains what is not trained yet, reads it on every task, and writes `NAME.md`, `NAME.csv` and `NAME.json`.

    The folder holds the editors, which studies share, and a run folder for each task; all of it resumes.

    Returns:
        The tables as text.

    Raises:
        InputError: no such study, a family without instructions, or a folder with other settings.
    """
    if name not in STUDIES:
        raise did_you_mean("study", name, STUDIES)
    study, folder, known = STUDIES[name], Path(out), task_families(families)
    trained = Editors(lm, folder, budget, families, known, on_progress)
    values: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for task in lm.progress.each("tasks", TASKS):
        parts = {unseen: [e for e in study.variants if e.unseen == unseen] for unseen in (False, True)}
        for unseen, variants in parts.items():
            editors = {} if unseen else {each: trained.baseline(each) for each in study.baselines}
            instructed = set()
            for variant in variants:
                if variant.own_tasks and task not in variant.tasks:
                    continue
                tasks = (task,) if variant.own_tasks else variant.tasks
                for seed in budget.seeds:
                    label = f"{variant.label}#{seed}"
                    instructed |= {label} if variant.settings.get("instructed", True) else set()
                    editors[label] = trained.of(variant, tasks, seed)
            if editors:
                cases = reading_cases(known[task], budget, unseen)
                run = folder / name / f"{task}{'-unseen' if unseen else ''}"
                on_progress(f"reading {task} with {', '.join(editors)}")
                results = bench(lm, cases, editors, run, dataset=task, plan=reading_plan(budget))
                values[UNEDITED, task] = fluency_before(results)
                for label in editors:
                    of = values.setdefault((label.partition("#")[0], task), {})
                    found = results.case_values[label, AFTER_EDIT]
                    _merge(of, as_trained(found, label in instructed), len(budget.seeds) if "#" in label else 1)
    return write_tables(folder, name, study.question, values, study.reference)


def task_families(path: str | None) -> dict[str, Family]:
    """The families of a file; raises InputError where a task of the studies is missing."""
    known = load_families(path)
    if missing := [task for task in TASKS if task not in known]:
        raise InputError(f"expected families {', '.join(TASKS)} in {path}; got no {', '.join(missing)}: add them")
    return known


class Editors(NamedTuple):
    """Trains what a study needs, or takes what an earlier one has left in the folder."""

    lm: LM
    folder: Path
    budget: Budget
    families: str | None
    """File of the task families."""
    known: Mapping[str, Family]
    """What is in it."""
    on_progress: Callable[[str], object]

    def of(self, variant: Variant, tasks: Sequence[str], seed: int) -> InstructEdit:
        marks = [f"{key}={value}" for key, value in variant.settings.items()]
        fields = {"rank": self.budget.rank, "families": self.families, "seed": seed, **variant.settings}
        cases = self.training_cases(tasks, variant.part_of_convsent)
        marks += [f"{len(cases)}-cases"] if variant.part_of_convsent else []
        return self.trained(InstructEdit(**fields), cases, [*tasks, *marks], len(tasks), seed)

    def baseline(self, name: str) -> Method:
        """Another method; one that learns is trained on all three tasks."""
        other = method(name)
        if not isinstance(other, Learned):
            return other
        return self.trained(other, self.training_cases(LEARNED), [*LEARNED, name], len(LEARNED), 0)

    def training_cases(self, tasks: Sequence[str], part: bool = False) -> list[Case]:
        """What the tasks have to learn from; of ConvSent only a `part`, if asked for."""
        found = {task: FamilySplit.of(self.known[task], self.budget.test).training for task in tasks}
        if part:
            found["convsent"] = part_of_convsent(found["convsent"])
        return [case for task in tasks for case in found[task]]

    def trained(
        self, learner: _AnyLearned, cases: Sequence[Case], marks: Sequence[str], parts: int, seed: int
    ) -> _AnyLearned:
        """Trained on cases of so many parts, for as many updates each."""
        place = self.folder / "editors" / "-".join([*marks, str(seed)])
        steps = self.budget.steps * parts
        training = replace(
            learner.training,
            steps=steps,
            batch_size=self.budget.batch_size,
            warmup=steps // 10,
            validation=0,
            validate_every=steps,
            checkpoint_every=50,
            seed=seed,
        )
        self.on_progress(f"training {place.name}: {steps} updates")
        return learner.fit(self.lm, cases, place, training)


def part_of_convsent(cases: Sequence[Case]) -> list[Case]:
    """The first 1,427 entries, as many as the article keeps; of a set that has no more, the same share of its own,
    9.9 %."""
    return list(cases[: _KEPT if len(cases) > _KEPT else round(len(cases) * _KEPT / _ALL)])


def reading_cases(family: Family, budget: Budget, unseen: bool) -> list[Case]:
    """The test cases behind the family's instructions in turn."""
    texts = family.texts(seen=not unseen)
    cases = quick_cases(FamilySplit.of(family, budget.test).test, budget)
    return [family.instruct(case, texts[i % len(texts)]) for i, case in enumerate(cases)]


def quick_cases(cases: Sequence[Case], budget: Budget) -> list[Case]:
    """The cases with few probes, the first ones with a prompt for sampled text."""
    return [few_probes(case, fluency=i < budget.fluency) for i, case in enumerate(cases)]


def reading_plan(budget: Budget) -> Plan:
    """How the editors of the studies are read."""
    return Plan(fluency=budget.fluency > 0, generate=False)


def fluency_before(results: Results) -> dict[str, dict[str, float]]:
    """The fluency of the unedited model on a run's cases, to which that of the edited ones is compared."""
    key = "fluency@sampled"
    return {case: {key: of[key]} for case, of in results.case_values[UNEDITED_BEFORE].items() if key in of}


def as_trained(found: Mapping[str, Mapping[str, float]], instructed: bool) -> dict[str, dict[str, float]]:
    """The values of each case with the reliability where the editor is asked as it was trained."""
    kind = "instructed" if instructed else "reliability"
    key = f"{kind}@teacher_forced_tokens"
    return {
        case: {**of, **({"as_trained@teacher_forced_tokens": of[key]} if key in of else {})}
        for case, of in found.items()
    }


def _merge(into: dict[str, dict[str, float]], found: Mapping[str, Mapping[str, float]], seeds: int) -> None:
    """Adds a seed's values to the means over seeds."""
    for case, metrics in found.items():
        of = into.setdefault(case, {})
        for key, value in metrics.items():
            of[key] = of.get(key, 0.0) + value / seeds
