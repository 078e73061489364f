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

    def __call__(self, family: Family, instruction: str) -> dict[str, float]:
        """Metric → mean over the family's cases with the instruction in front."""
        cases = [family.instruct(few_probes(case), instruction) for case in self.cases[family.name]]
        results = evaluate(self.lm, cases, self.method, Plan(generate=False))
        self.edits += len(cases)
        cells = {name: results.cells.get((self.method.name, AFTER_EDIT, key)) for name, key in METRICS.items()}
        return {name: cell.mean for name, cell in cells.items() if cell is not None}


def few_probes(case: Case) -> Case:
    """The case with the first probes of each kind and name, none for fluency; of ConvSent, whose texts count
    together, all."""
    kept: dict[tuple[str, str], list[Probe]] = {}
    for probe in case.probes:
        kept.setdefault((probe.kind, probe.name), []).append(probe)
    probes = [p for (kind, _), alike in kept.items() for p in (alike if kind == "sentiment" else alike[:_PROBES])]
    return replace(case, probes=tuple(p for p in probes if p.kind != "fluency"))
