"""What a page shows besides numbers: the run in words, answers before and after, failures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from reknow.evaluation.metrics import generated, unchanged_generated
from reknow.evaluation.readings import Reading
from reknow.evaluation.results import Results, row_readings
from reknow.evaluation.stages import AFTER_EDIT, BEFORE, END, UNEDITED
from reknow.texts.templates import fill, split_template
from reknow.texts.writing import clip

_MODES = {
    "single": "single: each case by itself on the unedited model",
    "batch": "batch: all edits made together",
    "sequential": "sequential: one edit after the other, all kept",
}
_PER_KIND = 2
"""Probes of a kind that a card shows."""


class _Answer(NamedTuple):
    """What one model said to a probe."""

    who: str
    text: str
    mark: str = ""
    """`right`, `wrong`, `same` or `changed`; empty where that is not asked."""
    changed: bool = False
    """Does it differ from what the unedited model said?"""


class _Question(NamedTuple):
    """A probe with the answers of the unedited and the edited models."""

    kind: str
    name: str
    prompt: str
    wanted: str
    answers: list[_Answer]


class _Card(NamedTuple):
    """A case: what was edited, and some of its probes."""

    request: tuple[str, str, str]
    """The prompt: what is before the subject, the subject, what is behind it."""
    edit: Mapping[str, str]
    questions: list[_Question]
    missed: bool
    """A method did not get the new answer out of the model, or changed a neighbour."""


def make_cards(results: Results) -> Iterator[_Card]:
    """Cases of which the model wrote something as cards, with the answers of the first seed at the last stage."""
    settings = results.manifest["settings"]
    for (case,), row in results.before.items():
        keys = {m: (m, settings["seeds"][0], settings["mode"], results.last_stage, case) for m in settings["methods"]}
        rows = {method: results.rows[key] for method, key in keys.items() if key in results.rows}
        after = {method: row_readings(found) for method, found in rows.items() if found["readings"]}
        if after:
            before = row_readings(row)
            questions = [
                _question(then, {method: found[number] for method, found in after.items()})
                for number, then in enumerate(before)
            ]
            missed = any(
                a.mark in ("wrong", "changed") for q in questions if q.kind != "portability" for a in q.answers
            )
            head, *tail = split_template(row["edit"]["prompt"])
            request = (head, row["edit"].get("subject", ""), "{}".join(tail))
            if shown := _selected(questions):
                yield _Card(request, row["edit"], shown, missed)


def _question(then: Reading, after: Mapping[str, Reading]) -> _Question:
    answers = [_Answer("before", _shown(then.text))]
    for method, now in after.items():
        mark = ""
        if now.text is None:
            pass
        elif now.kind == "locality":
            mark = "same" if unchanged_generated(then.text or "", now.text or "", now.answers) else "changed"
        elif now.kind not in ("fluency", "sentiment"):
            mark = "right" if generated(now.text or "", now.answers) else "wrong"
        answers.append(_Answer(method, _shown(now.text), mark, now.text != then.text))
    return _Question(then.kind, then.name, then.prompt, " / ".join(then.answers), answers)


def _selected(questions: list[_Question]) -> list[_Question]:
    """A few of each kind, those that went wrong first."""
    chosen: dict[str, list[_Question]] = {}
    for question in sorted(questions, key=lambda q: all(a.mark in ("", "right", "same") for a in q.answers)):
        if any(answer.text for answer in question.answers):
            chosen.setdefault(question.kind, []).append(question)
    order = dict.fromkeys(question.kind for question in questions)
    return [question for kind in order for question in chosen.get(kind, [])[: 1 if kind == "fluency" else _PER_KIND]]


def _shown(text: str | None, words: int = 60) -> str:
    return clip(text or "", words)


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
    settings = results.manifest["settings"]
    stage = AFTER_EDIT if settings["mode"] == "single" else END
    done = sum(row["stage"] == stage for row in results.rows.values())
    wanted = settings["cases"] * len(settings["methods"]) * len(settings["seeds"])
    return f"This run is not finished: {done} of {wanted} cases have been read to the end." if done < wanted else ""
