"""What the studies of settings share: cases read by teacher forcing alone, which is much quicker than a bench."""

from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from unittest.mock import patch as replaced

from reknow import LM, Case
from reknow.editing import band
from reknow.editing.values import find_values
from reknow.methods import alphaedit, emmet

KINDS = ("reliability", "generalization", "locality")


class Exam:
    """The probes of some cases, each with every token of its answer right, or as before the edit."""

    def __init__(self, lm: LM, cases: Sequence[Case]):
        self.lm, self.cases = lm, cases
        self.asked = [(i, probe) for i, case in enumerate(cases) for probe in case.questions if probe.kind in KINDS]
        self.before = self._answers(range(len(cases)))

    def _answers(self, wanted):
        asked = [(i, probe) for i, probe in self.asked if i in wanted]
        scores = self.lm.score([probe.prompt for _, probe in asked], [probe.answers[0] for _, probe in asked])
        return {(i, probe): score for (i, probe), score in zip(asked, scores, strict=True)}

    def right(self, wanted) -> dict[str, dict[int, float]]:
        """Kind → number of the case → share of its probes that are right, of the model as it is now."""
        found: dict[str, dict[int, list[bool]]] = {kind: {} for kind in KINDS}
        for (i, probe), now in self._answers(wanted).items():
            same = now.top == self.before[i, probe].top
            found[probe.kind].setdefault(i, []).append(same if probe.kind == "locality" else all(now.correct))
        return {kind: {i: fmean(values) for i, values in cases.items()} for kind, cases in found.items()}

    def rates(self, patches) -> list[float]:
        """Percentages by kind, means over cases; `patches` holds pairs (numbers of cases, patch) to read alone."""
        found: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
        for numbers, patch in patches:
            with self.lm.patched(patch):
                for kind, cases in self.right(numbers).items():
                    found[kind] |= cases
        return [100 * fmean(cases.values()) for cases in found.values()]


@contextmanager
def one_search():
    """While open, the search for the same facts with the same settings on the same stack is made once."""
    made = {}

    def remembered(lm, edits, *rest, **options):
        key = (id(lm), tuple(patch.id for patch in lm.patches), tuple(edits), *map(repr, rest), repr(options))
        if key not in made:
            made[key] = find_values(lm, edits, *rest, **options)
        return made[key]

    with ExitStack() as stack:
        for module in (alphaedit, emmet, band):
            stack.enter_context(replaced.object(module, "find_values", remembered))
        yield
