"""The columns of a verdict, by protocol, and how their numbers are printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from reknow.evaluation.metrics import PROTOCOLS
from reknow.evaluation.results import Cell

PROTOCOL_NAMES = {
    "generated": "free generation",
    "teacher_forced_exact": "teacher-forced: exact",
    "teacher_forced_tokens": "teacher-forced: tokens",
    "judged": "judged by a model",
    "match": "answer anywhere",
    "contrast": "new against true",
    "likelihood": "likelihood of texts",
    "written": "words of long answers",
}
"""Protocol → its name on the page; the first that was read is shown first."""
_FEW = 200
"""From so many cases on a share has a digit behind the point."""


class Column(NamedTuple):
    """A column of the verdict: one line here is all that a further one takes."""

    name: str
    metrics: Mapping[str, str] | str
    """Protocol → metric, with `@` where it is another protocol's; or one key whatever the protocol."""
    unit: str = "%"
    lower: bool = False
    """Is less better?"""
    held_out: bool = False
    """Is it measured on the held-out texts, so that runs with other ones cannot be compared in it?"""

    @property
    def asked(self) -> bool:
        """Is it about answers, whose protocol can be chosen?"""
        return not isinstance(self.metrics, str)

    def key(self, protocol: str) -> str | None:
        """`metric@protocol` of the numbers; None: this protocol has none."""
        if isinstance(self.metrics, str):
            return self.metrics
        metric = self.metrics.get(protocol)
        return metric if metric is None or "@" in metric else f"{metric}@{protocol}"


def _of_kind(kind: str, **others: str) -> dict[str, str]:
    return {**dict.fromkeys((*PROTOCOLS, "judged"), kind), **others}


NEW = Column(
    "new answer",
    _of_kind("reliability", match="contains", contrast="ES", likelihood="sentiment", written="token_f1"),
)
PARAPHRASES = Column(
    "paraphrases",
    _of_kind("generalization", match="paraphrase_contains", contrast="PS", written="paraphrase_token_f1"),
)
KEPT = Column(
    "other facts kept",
    _of_kind(
        "locality", judged="locality@generated", match="locality@generated", contrast="NS", likelihood="z_topic"
    ),
)
COLUMNS = (
    NEW,
    PARAPHRASES,
    KEPT,
    Column("consequences", _of_kind("portability")),
    Column("negated", _of_kind("negation")),
    Column("reversed", _of_kind("reversal")),
    Column("instructed", _of_kind("instructed")),
    Column("perplexity", "perplexity@side", unit="", lower=True, held_out=True),
    Column("drift", "kl@side", unit="nats", lower=True, held_out=True),
    Column("weights moved", "weight_change@side", unit="relative", lower=True),
    Column("fluency", "fluency@sampled", unit="bits"),
    Column("time per edit", "seconds@edit", unit="s", lower=True),
    Column("stored per edit", "stored_kb@edit", unit="kB", lower=True),
)
ABOUT = {
    "new answer": "the request's own prompt gives the new answer (reliability)",
    "paraphrases": "so do the same questions in other words (generalization)",
    "other facts kept": "other questions are answered as before the edit, whether that was right or wrong (locality)",
    "consequences": "what follows from the new fact follows (portability)",
    "negated": "the new answer does not follow where the request is negated",
    "reversed": "the subject follows where it is asked for by the new answer",
    "instructed": "the new answer where the edit comes with an instruction",
    "perplexity": "of held-out text under the edited model: rises when an edit does general harm",
    "drift": "KL(unedited ‖ edited) per token of that text, in nats",
    "weights moved": "the largest relative change of a matrix, ‖ΔW‖ / ‖W‖",
    "fluency": "entropy of the word pairs and triples of sampled text: low where it repeats itself",
    "time per edit": "of making the patch, the model loaded",
    "stored per edit": "what the patch keeps: change of weights or memory",
}


def number(cell: Cell | None, column: Column) -> str:
    """The mean as people read it, with its unit but for shares."""
    return "–" if cell is None else amount(cell.mean, column.unit, cell.cases)


def interval(cell: Cell, column: Column) -> str:
    """The bounds of the mean; of a measurement that edits share, that it is one."""
    if cell.protocol == "side" and cell.together > 1:
        return ""
    if cell.together > 1:
        return f"mean of {cell.cases} made {f'{cell.together} ' if cell.together < cell.cases else ''}together"
    if cell.low is None or cell.high is None:
        return ""
    if cell.low == cell.high:  # all cases agree, so that a resampled one says nothing of how far to trust it
        alike = {0.0: f"in none of {cell.cases}", 1.0: f"in all {cell.cases}"} if column.asked else {}
        return alike.get(cell.mean, "")
    low, high = (amount(bound, column.unit, cell.cases) for bound in (cell.low, cell.high))
    if low == high:
        return ""
    *number_low, unit_low = low.split(" ")
    return f"{' '.join(number_low) if number_low and high.endswith(f' {unit_low}') else low} – {high}"


def amount(value: float, unit: str, cases: int = 1) -> str:
    """A number with its unit; shares are percent without the sign, which stands above them."""
    if unit == "%":
        return f"{100 * value:.{0 if cases < _FEW else 1}f}"
    if unit == "kB":
        for size, name in ((1e6, "GB"), (1e3, "MB"), (1, "kB")):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return f"{1000 * value:.0f} B"
    if unit == "s":
        return f"{value / 60:.1f} min" if value >= 600 else f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    if unit in ("nats", "relative"):
        return f"{value:.2g}" if value >= 1e-5 else "<1e-5"
    return f"{value:.2f}"
