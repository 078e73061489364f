"""The trial editor: what an editor makes of an instruction, read on cases that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from reknow.contract import Method
from reknow.datasets.cases import load_cases
from reknow.datasets.families import Family
from reknow.edits import Case, Probe
from reknow.evaluation import Plan, evaluate
from reknow.evaluation.stages import AFTER_EDIT
from reknow.lm import LM

METRICS = {
    "reliability": "reliability@teacher_forced_tokens",
    "instructed": "instructed@teacher_forced_tokens",
    "generalization": "generalization@teacher_forced_tokens",
    "locality": "locality@teacher_forced_tokens",
    "portability": "portability@teacher_forced_tokens",
    "sentiment": "sentiment@likelihood",
}
"""What is read of a trial; a family has the metrics for which its cases have probes."""
_TEST, TRIAL = 50, 10
"""Cases of a data set that are set aside: for the evaluation, and to score instructions on."""
_PROBES = 2
"""How many probes of a kind and name a trial reads of each case, to be quick."""


@dataclass(frozen=True)
class FamilySplit:
    """The cases of a family, parted in the order of its data set, so that every command parts them alike."""

    test: list[Case]
    trial: list[Case]
    """To score instructions on."""
    training: list[Case]

    @classmethod
    def of(cls, family: Family, test: int = _TEST, trial: int = TRIAL) -> FamilySplit:
        """The first `test` cases, the next `trial` cases, and the rest without those that ask the same."""
        cases = load_cases(family.data)
        kept = {case.edit.text for case in cases[: test + trial]}
        rest = [case for case in cases[test + trial :] if case.edit.text not in kept]
        return cls(cases[:test], cases[test : test + trial], rest)


@dataclass
class InstructionScorer:
    """Scores instructions with one editor on a few cases of each family."""

    lm: LM
    method: Method
    cases: Mapping[str, Sequence[Case]]
    """Family → cases, none of which the editor has learned from."""
    edits: int = field(default=0, init=False)
    """Made so far."""

    def __call__(self, family: Family, instruction: str) -> dict[str, list[float | None]]:
        """Metric → its value on each of the family's cases with the instruction in front; None: the case has none."""
        cases = [family.instruct(few_probes(case), instruction) for case in self.cases[family.name]]
        results = evaluate(self.lm, cases, self.method, Plan(generate=False))
        self.edits += len(cases)
        found = [*results.case_values[self.method.name, AFTER_EDIT].values()]
        values = {name: [of.get(key) for of in found] for name, key in METRICS.items()}
        return {name: of for name, of in values.items() if any(value is not None for value in of)}


def few_probes(case: Case, *, fluency: bool = False) -> Case:
    """The case with the first probes of each kind and name; of ConvSent, whose texts count together, all.

    Args:
        fluency: keep one prompt for sampled text too, the case's first, or else what is asked itself.
    """
    kept: dict[tuple[str, str], list[Probe]] = {}
    for probe in case.probes:
        kept.setdefault((probe.kind, probe.name), []).append(probe)
    probes = [p for (kind, _), alike in kept.items() for p in (alike if kind == "sentiment" else alike[:_PROBES])]
    kept_probes = [p for p in probes if p.kind != "fluency"]
    if fluency:
        own = [p for p in probes if p.kind == "fluency"]
        kept_probes.append(own[0] if own else Probe(case.edit.text, (), "fluency", "request"))
    return replace(case, probes=tuple(kept_probes))
