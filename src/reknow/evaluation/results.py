"""The rows of a run as numbers: per method, stage and metric the mean over cases with its interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from reknow.errors import EditFailed, MissingExtra
from reknow.evaluation.ability import average_abilities, read_abilities
from reknow.evaluation.intervals import average_cases
from reknow.evaluation.judged import judged_metrics
from reknow.evaluation.matching import MATCHES
from reknow.evaluation.metrics import PROTOCOLS, case_metrics
from reknow.evaluation.readings import Reading
from reknow.evaluation.run_folder import RunManifest, own_rows
from reknow.evaluation.run_parts import read_rows, say_missing
from reknow.evaluation.stages import (
    AFTER_EDIT,
    BEFORE,
    END,
    IN_CONTEXT,
    UNEDITED,
    checkpoint_edits,
    stage_label,
    stage_order,
)
from reknow.files.manifest import read_manifest
from reknow.texts.tables import to_columns, to_csv, to_latex, to_markdown

UNEDITED_BEFORE = (UNEDITED, BEFORE)
"""Method and stage under which the unedited model's answers stand."""
_MEASURED = ("seconds", "peak_memory_mb")
"""Costs that are measured over all edits which are made together."""
_COSTS = (*_MEASURED, "stored_kb", "steps", "loss", "repetitions")

KINDS = ("reliability", "instructed", "generalization", "locality", "portability", "negation", "reversal")
_WRITTEN = ("token_f1", "bleu", "rouge_1", "rouge_2", "rouge_l")
_OVERLAPS = tuple(f"{start}{name}" for start in ("", "paraphrase_") for name in _WRITTEN)
_MATCHED = tuple(f"{start}{name}" for start in ("", "paraphrase_") for name in MATCHES if name != "generated")
SIDE = ("perplexity", "kl", "weight_change")
"""What edits do besides; see `held_out_perplexity` and those behind it in rows."""
TABLES = (
    ("teacher_forced_exact", "Teacher-forced, every token of the answer right, %", KINDS),
    ("teacher_forced_tokens", "Teacher-forced, share of the answer's tokens right, %", KINDS),
    ("generated", "Free generation begins with the answer, %", KINDS),
    ("match", "Free generation, the first sentence is the answer, or the text has it somewhere, %", _MATCHED),
    ("judged", "A model judges that what was written gives the answer, %", KINDS),
    ("contrast", "CounterFact, new answer against true one, %", ("ES", "PS", "NS", "S")),
    ("contrast", "CounterFact, difference of the probabilities, %", ("EM", "PM", "NM")),
    (
        "likelihood",
        "ConvSent, texts of the wanted sentiment against others, %",
        ("sentiment", "z_sentiment", "z_topic"),
    ),
    ("divergence", "ConvSent, change on another topic, nats", ("drawdown",)),
    ("written", "Long answers, words in common with what the model writes, %", _OVERLAPS),
    ("sampled", "Sampled text", ("fluency", "perplexity", "PPL_r")),
    ("side", "Other text and the weights: perplexity, KL to the unedited model in nats, relative change", SIDE),
    ("ability", "Abilities, tasks of lm-evaluation-harness, items right, %", ()),
    ("edit", "Cost of an edit", (*_COSTS, "failed")),
)
"""Protocol, title and columns of the tables."""
_PERCENT = (*PROTOCOLS, "match", "judged", "contrast", "likelihood", "written", "ability")


class Cell(NamedTuple):
    """One number of the results."""

    method: str
    stage: str
    metric: str
    protocol: str
    mean: float
    low: float | None
    """Bounds of the 95 % interval; None with a single case, or where the cases share one measurement."""
    high: float | None
    cases: int
    together: int = 1
    """How many edits, made together, share one measurement."""

    def number(self) -> str:
        """The mean as tables show it; shares in percent."""
        return self._shown(self.mean)

    def interval(self) -> str:
        """The bounds in brackets, what the number is where it has none, or nothing."""
        if self.protocol == "side" and self.together > 1:
            return ""
        if self.together > 1:
            groups = "made" if self.together >= self.cases else f"made {self.together}"
            return f"(mean of {self.cases} {groups} together)"
        bounds = [self._shown(bound) for bound in (self.low, self.high) if bound is not None]
        return f"[{', '.join(bounds)}]" if bounds else ""

    def _shown(self, value: float) -> str:
        if self.protocol == "divergence":
            return f"{value:.4f}"
        if self.protocol == "side" and self.metric != "perplexity":
            return f"{value:.4f}" if value >= 0.0095 else f"{value:.1e}" if value >= 1e-5 else "<1e-5"  # rounding
        percent = self.protocol in _PERCENT
        value = value * 100 if percent else value
        return f"{value:.{1 if percent or value >= 100 else 2}f}"


class Table(NamedTuple):
    """The numbers of one protocol."""

    protocol: str
    title: str
    metrics: tuple[str, ...]
    rows: list[tuple[str, str, int, list[Cell | None]]]
    """Method, stage, number of cases, and a cell per metric; None where no case has such probes."""

    def lines(self) -> list[list[str]]:
        """Header and rows as texts; a number over fewer cases than its row says so."""
        lines = [["method", "read", "cases", *self.metrics]]
        for method, stage, cases, cells in self.rows:
            texts = ["–" if cell is None else f"{cell.number()} {cell.interval()}".strip() for cell in cells]
            fewer = [f" (n={cell.cases})" if cell and cell.cases < cases else "" for cell in cells]
            texts = [text + more for text, more in zip(texts, fewer, strict=True)]
            lines.append([method, stage_label(stage), str(cases), *texts])
        return lines


@dataclass(frozen=True)
class Results:
    """What a run found. `print` shows the tables; `load` reads a run folder, finished or not."""

    manifest: Mapping
    before: Mapping[tuple, dict]
    rows: Mapping[tuple, dict]
    added: Mapping[tuple, Mapping[str, float]] = field(default_factory=dict)
    """Row → metrics that were measured besides: what a study adds to the numbers of a run."""
    unfinished: str | None = None
    """Which rows are missing, in one sentence."""
    waiting: Mapping[tuple, dict] = field(default_factory=dict)
    """Rows of cases that the unedited model was not asked yet, so that there is nothing to compare them with."""

    abilities: Mapping[tuple, dict] = field(default_factory=dict)
    """Rows of `ability.jsonl`: what the models did in tasks of lm-evaluation-harness."""

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """The results in a run folder, of all its parts; rows that its manifest does not name are left out with a
        warning.

        Raises:
            InputError: there is none, or a file in it holds something else than it should.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, RunManifest)
        return cls.of_run(manifest, *read_rows(folder, manifest), None, folder)

    @classmethod
    def of_run(
        cls,
        manifest: Mapping,
        before: Mapping[tuple, dict],
        rows: Mapping[tuple, dict],
        names: Collection[str] | None,
        folder: Path,
    ) -> Results:
        """The results of a run folder with these rows, whose cases have these names; None: those of `before`."""
        asked, own = own_rows(manifest, before, rows, names, folder)
        here = {(name,) for name in manifest.get("names", ())} - asked.keys()
        waiting = {key: row for key, row in rows.items() if (row["case"],) in here}
        unfinished = say_missing(manifest, before, rows, folder)
        abilities = read_abilities(folder, manifest["settings"])
        judged = judged_metrics(folder, asked, own)
        return cls(manifest, asked, own, judged, unfinished=unfinished, waiting=waiting, abilities=abilities)

    @cached_property
    def last_stage(self) -> str:
        """The latest stage that has rows; of a finished run the one that sums it up."""
        stages = (row["stage"] for row in self.rows.values() if row["stage"] != IN_CONTEXT)
        return max(stages, key=stage_order, default=BEFORE)

    @cached_property
    def case_values(self) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
        """(method, stage) → case → metric → value; several seeds of a case are averaged first."""
        found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        before = {case: row_readings(row) for (case,), row in self.before.items()}
        for (case,), row in self.before.items():
            values = {**case_metrics(before[case]), **_side(row)}
            for key, value in {**values, **self.added.get((case,), {})}.items():
                if value is not None:
                    found[UNEDITED_BEFORE][case][key].append(value)
        for place, row in sorted(self.rows.items(), key=lambda item: self._order(item[1])):
            now = row_readings(row)
            then = before[row["case"]] if now else ()
            values = case_metrics(now, then, failed=row["error"] is not None)
            values |= _side(row)
            if row["stage"] == AFTER_EDIT or (row["mode"] == "batch" and row["stage"] != IN_CONTEXT):
                values |= {f"{name}@edit": row.get(name) for name in _COSTS}
                values["failed@edit"] = float(row["error"] is not None)
            for key, value in {**values, **self.added.get(place, {})}.items():
                if value is not None:
                    found[row["method"], row["stage"]][row["case"]][key].append(value)
        return {
            group: {case: {k: sum(v) / len(v) for k, v in keys.items()} for case, keys in cases.items()}
            for group, cases in found.items()
        }

    def _order(self, row: Mapping) -> tuple[int, float]:
        names = [UNEDITED, *self.manifest["settings"]["methods"]]
        return names.index(row["method"]), stage_order(row["stage"])

    @cached_property
    def cells(self) -> dict[tuple[str, str, str], Cell]:
        """(method, stage, metric@protocol) → number, over the cases that have it."""
        found = {}
        for group, cases in self.case_values.items():
            for key, (mean, low, high, count) in average_cases(list(cases.values())).items():
                together = self._together.get((*group, key), 1) if count > 1 else 1
                bounds = (low, high) if together == 1 else (None, None)
                metric, protocol = key.split("@")
                found[(*group, key)] = Cell(*group, metric, protocol, mean, *bounds, count, together)
        for (method, stage, task), mean in average_abilities(self.abilities).items():
            found[method, stage, f"{task}@ability"] = Cell(method, stage, task, "ability", *mean)
        return found

    @cached_property
    def _together(self) -> dict[tuple[str, str, str], int]:
        """(method, stage, cost) → how many edits, at most, share one measurement of it."""
        found: dict[tuple[str, str, str], int] = {}
        for row in self.rows.values():
            batch = len(self.before) if row["mode"] == "batch" else 1  # rows of earlier versions do not say it
            for name in _MEASURED if row["mode"] == "single" else _COSTS:
                key = (row["method"], row["stage"], f"{name}@edit")
                found[key] = max(found.get(key, 1), row.get("together", batch))
            if row["mode"] != "single" and row["stage"] != AFTER_EDIT:
                shared = len(self.before) if row["stage"] == END else checkpoint_edits(row["stage"]) or 1
                found |= {(row["method"], row["stage"], f"{name}@side"): shared for name in SIDE}
        found |= {(*UNEDITED_BEFORE, f"{name}@side"): len(self.before) for name in SIDE}
        return found

    @cached_property
    def failed(self) -> dict[str, dict[str, str]]:
        """Method → case → why its edit could not be made, or its questions not be read; of methods that have such."""
        found: dict[str, dict[str, str]] = {}
        for row in (*self.rows.values(), *self.waiting.values()):
            if row["error"] is not None:
                found.setdefault(row["method"], {})[row["case"]] = row["error"]
        return found

    def refuse_lost(self) -> None:
        """Raises EditFailed where a method made none of its edits, whose scores say nothing about it."""
        made = {row["method"] for row in self.rows.values() if row["error"] is None}
        for method, reasons in self.failed.items():
            if method not in made:
                raise EditFailed(
                    f"expected edits that {method} can make; all {len(reasons)} failed, the first because: "
                    f"{next(iter(reasons.values()))}"
                )

    def notes(self) -> list[str]:
        """What is in no score or counts as no success: missing rows, records that could not be read, edits that
        failed."""
        notes = [] if self.unfinished is None else [f"{self.unfinished}."]
        if refused := self.manifest.get("refused"):
            notes.append(f"Records that could not be read, in no score: {len(refused)}. The first: {refused[0]}")
        if self.failed:
            counts = ", ".join(
                f"{method} {len(cases)} of {self.manifest['settings']['cases']}"
                for method, cases in self.failed.items()
            )
            case, reason = next(iter(next(iter(self.failed.values())).items()))
            notes.append(f"Failed edits, which count as no success: {counts}. The first: {case}, {reason}")
        return notes

    def tables(self) -> list[Table]:
        """A table for each protocol that was read; metrics that no case has are left out."""
        tables = []
        for protocol, title, names in TABLES:
            if protocol == "ability":
                names = tuple(dict.fromkeys(cell.metric for cell in self.cells.values() if cell.protocol == protocol))
            names = tuple(name for name in names if any(f"{name}@{protocol}" == key[2] for key in self.cells))
            rows = [
                (*group, len(cases), [self.cells.get((*group, f"{name}@{protocol}")) for name in names])
                for group, cases in self.case_values.items()
            ]
            if names:
                tables.append(Table(protocol, title, names, [row for row in rows if any(row[3])]))
        return tables

    def to_csv(self) -> str:
        """All numbers, one on each line; shares as fractions."""
        return to_csv([Cell._fields, *self.cells.values()])

    def to_markdown(self) -> str:
        """The tables as Markdown."""
        parts = [f"**{one.title}** (`{one.protocol}`)\n\n{to_markdown(one.lines())}" for one in self.tables()]
        return "\n\n".join(parts) + "\n"

    def to_latex(self) -> str:
        """The tables in LaTeX, for the package booktabs."""
        parts = [to_latex(one.lines(), f"{one.title} ({one.protocol})") for one in self.tables()]
        return "\n\n".join(["% \\usepackage{booktabs}", *parts]) + "\n"

    def frame(self, *, by_case: bool = False) -> Any:
        """A pandas data frame: a row per method, stage, metric and protocol, with mean, low, high, n and together.

        Args:
            by_case: a row per case of each instead, with its value; what several seeds gave is averaged.

        Raises:
            MissingExtra: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise MissingExtra("pandas", "frame", "a data frame of results") from error
        if not by_case:
            return DataFrame(list(self.cells.values()), columns=list(Cell._fields)).rename(columns={"cases": "n"})
        rows = [
            (method, stage, case, *key.split("@"), value)
            for (method, stage), cases in self.case_values.items()
            for case, values in cases.items()
            for key, value in values.items()
        ]
        return DataFrame(rows, columns=["method", "stage", "case", "metric", "protocol", "value"])

    def __str__(self) -> str:
        parts = [
            "\n  ".join([f"{table.title} ({table.protocol})", *to_columns(table.lines())]) for table in self.tables()
        ]
        parts.append(
            "Means over cases [95 % bootstrap interval]. Locality: the answer is as before the edit, right or wrong."
        )
        parts += self.notes()
        return "\n\n".join(parts)


def row_readings(row: Mapping) -> list[Reading]:
    """The readings of a row of a run folder."""
    return [Reading.from_json(record) for record in row["readings"]]


def _side(row: Mapping) -> dict[str, float | None]:
    """What was measured on held-out texts and on the weights."""
    fields = ("held_out_perplexity", "held_out_kl", "weight_change")
    return {f"{name}@side": row.get(field) for name, field in zip(SIDE, fields, strict=True)}
