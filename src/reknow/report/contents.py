"""What a page shows besides numbers: the run in words, answers before and after, failures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from reknow.evaluation.metrics import PROTOCOLS, case_metrics
from reknow.evaluation.readings import Reading
from reknow.evaluation.results import Results, row_readings
from reknow.evaluation.stages import AFTER_EDIT, BEFORE, END, UNEDITED
from reknow.report.columns import KEPT, NEW, PARAPHRASES
from reknow.texts.templates import fill, split_template
from reknow.texts.writing import clip

_MODES = {
    "single": "single: each case by itself on the unedited model",
    "batch": "batch: all edits made together",
    "sequential": "sequential: one edit after the other, all kept",
}
_EDITED = {"single": "each by itself", "batch": "all in one patch", "sequential": "one after the other"}


class Answer(NamedTuple):
    """What one model said to a probe."""

    who: str
    text: str | None
    """What it wrote; None where it was not asked to."""
    marks: Mapping[str, str]
    """Protocol → `right`, `wrong`, `same` or `changed`; none of the unedited model."""
    changed: bool
    """Does the text differ from what the unedited model wrote?"""
    likely: list[tuple[str, float]]
    """Answer → its probability per token, e^(−nll)."""


class Question(NamedTuple):
    """A probe with the answers of the unedited and the edited models."""

    kind: str
    name: str
    prompt: str
    wanted: str
    answers: list[Answer]


class Score(NamedTuple):
    """What a method made of a case under one protocol: a sum of scores, and of how many probes."""

    new: float = 0.0
    of_new: int = 0
    paraphrases: float = 0.0
    of_paraphrases: int = 0
    kept: float = 0.0
    of_kept: int = 0


class Card(NamedTuple):
    """A case: what was edited, and all its probes."""

    case: str
    request: tuple[str, str, str]
    """The prompt: what is before the subject, the subject, what is behind it."""
    edit: Mapping[str, Any]
    questions: list[Question]
    scores: dict[str, dict[str, Score]]
    """Protocol → method → score."""
    errors: dict[str, str]
    """Method → why its edit failed."""


_COLUMNS = {"reliability": NEW, "generalization": PARAPHRASES, "locality": KEPT}
_PLACES = {kind: place for place, kind in enumerate(_COLUMNS)}
_METRICS = {
    protocol: {kind: column.key(protocol) for kind, column in _COLUMNS.items()}
    for protocol in (*PROTOCOLS, "match", "contrast")
}
"""Protocol → kind → the number that says whether a question of it went well."""


def make_cards(results: Results) -> Iterator[Card]:
    """All cases that an edited model was asked, with its answers at the last stage in the first seed."""
    settings = results.manifest["settings"]
    for (case,), row in results.before.items():
        keys = {m: (m, settings["seeds"][0], settings["mode"], results.last_stage, case) for m in settings["methods"]}
        rows = {method: results.rows[key] for method, key in keys.items() if key in results.rows}
        if rows:
            card = _card(case, row, rows)
            for method, key in keys.items():
                _add_judged(card, method, results.added.get(key, {}))
            yield card


def _card(case: str, row: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> Card:
    before, edit = row_readings(row), row["edit"]
    errors = {method: found["error"] for method, found in rows.items() if found["error"] is not None}
    after = {method: row_readings(found) for method, found in rows.items() if found["readings"]}
    sums: dict[tuple[str, str], list[float]] = {}
    questions = []
    for number, then in enumerate(before):
        answers = [Answer("before", _shown(then.text), {}, False, _likely(then, edit))]
        for method, readings in after.items():
            now = readings[number]
            scores = case_metrics([now], [then], failed=method in errors)
            marks = {}
            for protocol, metrics in _METRICS.items():
                value = scores.get(metrics.get(now.kind) or f"{now.kind}@{protocol}")
                if value is not None:
                    marks[protocol] = _mark(now.kind, value)
                    if now.kind in _PLACES:
                        total = sums.setdefault((protocol, method), [0.0] * 6)
                        total[2 * _PLACES[now.kind]] += value
                        total[2 * _PLACES[now.kind] + 1] += 1
            changed = now.text != then.text and bool(marks)
            answers.append(Answer(method, _shown(now.text), marks, changed, _likely(now, edit)))
        if then.kind == "fluency" and not any(answer.text for answer in answers):
            continue  # nothing was sampled
        questions.append(Question(then.kind, then.name, then.prompt, " / ".join(then.answers), answers))
    found: dict[str, dict[str, Score]] = {}
    for (protocol, method), (a, b, c, d, e, f) in sums.items():
        found.setdefault(protocol, {})[method] = Score(a, int(b), c, int(d), e, int(f))
    head, *tail = split_template(edit["prompt"])
    request = (head, edit.get("subject") or "", "{}".join(tail))
    return Card(case, request, edit, questions, found, errors)


def _add_judged(card: Card, method: str, measured: Mapping[str, float]) -> None:
    """What a judge said of the case, as a mean over each kind's questions; it says nothing of what was kept."""
    new, paraphrases = (measured.get(f"{kind}@judged") for kind in ("reliability", "generalization"))
    if new is not None:
        kept = card.scores.get("generated", {}).get(method, Score())
        paraphrases, asked = (0.0, 0) if paraphrases is None else (paraphrases, 1)
        card.scores.setdefault("judged", {})[method] = Score(new, 1, paraphrases, asked, kept.kept, kept.of_kept)


def _mark(kind: str, value: float) -> str:
    if kind == "locality":
        return "same" if value == 1 else "changed"
    return "right" if value == 1 else "wrong"


def _likely(reading: Reading, edit: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The probabilities per token that were read: of the new and the true answer, else of the one that is asked."""
    if reading.kind in ("fluency", "sentiment"):
        return []
    pairs = [(edit["target_new"], reading.nll_new), (edit.get("target_true"), reading.nll_true)]
    if reading.nll_new is None or reading.nll_true is None:
        pairs = [(reading.answers[0], reading.nll)]
    return [(_shown(str(answer), 12) or "", math.exp(-nll)) for answer, nll in pairs if nll is not None]


def _shown(text: str | None, words: int = 60) -> str | None:
    return None if text is None else clip(text, words)


def describe_methods(results: Results) -> list[str]:
    """A sentence per method: what one would tell a colleague."""
    sentences = []
    for method in results.manifest["settings"]["methods"]:

        def of(metric: str, stage: str = results.last_stage, method: str = method):
            cell = results.cells.get((method, stage, metric))
            return None if cell is None else cell.mean

        new, first = of("reliability@generated"), of("reliability@generated", AFTER_EDIT)
        before = of("reliability@generated", BEFORE, UNEDITED)
        if new is None or before is None:
            continue
        earlier = f"before: {before:.0%}"
        if results.last_stage == END and first is not None:
            earlier += f", right after each edit: {first:.0%}"
        text = f"{method}: left to write, the model gives the new answer in {new:.0%} of the cases ({earlier})"
        if (paraphrased := of("generalization@generated")) is not None:
            text += f", to paraphrases in {paraphrased:.0%}"
        if (same := of("locality@generated")) is not None:
            text += f"; {same:.0%} of its other answers are as before"
        if (seconds := of("seconds@edit", AFTER_EDIT) or of("seconds@edit")) is not None:
            text += f"; {seconds:.2g} s an edit"
        sentences.append(text + ".")
    return sentences


def describe_head(results: Results) -> dict[str, str]:
    """What stands above everything: model, data, how many, how, when."""
    manifest, settings = results.manifest, results.manifest["settings"]
    cases, seeds = settings["cases"], len(settings["seeds"])
    return {
        "Model": manifest["model"],
        "Data": str(settings["dataset"] or "a list"),
        "Cases": f"{cases:,}" + (f" × {seeds} seeds" if seeds > 1 else ""),
        "Edited": _EDITED[settings["mode"]],
        "Date": manifest.get("started", "")[:10] or "–",
    }


def describe_run(results: Results) -> dict[str, str]:
    """The manifest in words."""
    manifest, settings = results.manifest, results.manifest["settings"]
    machine = manifest.get("machine", {})
    found = {
        "Model": f"{manifest['model']} ({manifest['dtype']}, fingerprint {settings['model']})",
        "Cases": f"{settings['cases']} of {settings['dataset'] or 'a list'} (digest {settings['cases_digest']})",
        "Mode": _MODES[settings["mode"]]
        + (f", {settings['batch_size']} at a time" if settings["batch_size"] > 1 else ""),
        "Seeds": ", ".join(map(str, settings["seeds"])),
        "Machine": ", ".join(
            str(part)
            for part in (machine.get("gpu"), f"{machine.get('cores')} cores", machine.get("system"))
            if part is not None
        ),
        "Software": f"reknow {settings['reknow']}, torch {machine.get('torch')}, Python {machine.get('python')}",
        "Started": manifest.get("started", ""),
    }
    for label, about in settings["methods"].items():
        if "source" in about and "name" not in about:
            found[f"Edited elsewhere: {label}"] = f"{about['source']} (content {about['content']})"
    if settings["patches"]:
        found["Patches applied before"] = ", ".join(settings["patches"])
    if refused := manifest.get("refused"):
        found["Records that could not be read"] = f"{len(refused)}, in no score; the first: {refused[0]}"
    return found


def list_failures(results: Results) -> list[dict[str, Any]]:
    """Edits that could not be made or read: method, case, seed, request and the reason; each once."""
    found = {}
    for row in results.rows.values():
        if row["error"] is not None:
            edit = results.before[row["case"],]["edit"]
            request = fill(edit["prompt"], edit.get("subject")) + " → " + edit["target_new"]
            found[row["method"], row["seed"], row["case"]] = {**row, "request": request}
    return list(found.values())


def describe_rest(results: Results) -> str:
    """A sentence about a run that has not made all its rows, or nothing."""
    if results.unfinished is not None:
        return f"{results.unfinished}."
    settings = results.manifest["settings"]  # an earlier version's does not say which rows there are
    stage = AFTER_EDIT if settings["mode"] == "single" else END
    done = sum(row["stage"] == stage for row in results.rows.values())
    wanted = settings["cases"] * len(settings["methods"]) * len(settings["seeds"])
    return f"This run is not finished: {done} of {wanted} cases have been read to the end." if done < wanted else ""
