"""Writes the page: one HTML file that needs nothing else; and Markdown, CSV, LaTeX and pictures."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from reknow.evaluation.results import Results
from reknow.evaluation.stages import stage_label
from reknow.files.atomic import atomic_write, write_text
from reknow.report import contents, drawing, plots
from reknow.report.case_list import list_cases
from reknow.report.columns import KEPT, NEW, PROTOCOL_NAMES
from reknow.report.retention import by_age, so_far
from reknow.report.verdict import (
    Entry,
    Verdict,
    about,
    entries_of,
    make_verdict,
    read_protocols,
    verdict_lines,
    verdict_sentence,
)
from reknow.texts.tables import to_latex, to_markdown

_NAMED = 4
"""Methods that a title names; more are counted."""
_MARKED = (
    "★ best; ≈ not told apart from it: the 95 % bootstrap interval of the difference, case by case, holds 0, or p of "
    "the permutation test by signs is not below 5 %."
)
_HERE = Path(__file__).parent

READ = {
    "teacher_forced_exact": "The answer's tokens are put behind the prompt: 1 if each is the most likely one there.",
    "teacher_forced_tokens": "The answer's tokens are put behind the prompt: the share of them that are the most "
    "likely there, so that an answer half right has half the score.",
    "generated": "The model continues the bare prompt by itself with the most likely tokens: 1 if that begins with "
    "an accepted answer, letter case, punctuation and articles aside.",
    "match": "Exact: the first sentence that the model writes is an accepted answer, letter for letter. Normalised: "
    "it is one, letter case, punctuation and articles aside. Contains: an accepted answer stands anywhere in what it "
    "writes. Paraphrase: asked in other words.",
    "judged": "A language model was shown the question, the accepted answers and what was written, and said whether "
    "that gives the answer (reknow judge).",
    "contrast": "ES: on the request the new answer is likelier per token than the true one. PS: so on paraphrases. "
    "NS: on neighbours, like questions about other subjects, the true one "
    "stays likelier. S: harmonic mean of the three. EM, PM, NM: by how much.",
    "likelihood": "z_sentiment: the texts of the wanted sentiment against as many of the other. z_topic: how likely "
    "they still are, at most 1. Sentiment: the product of both, the edit's success.",
    "divergence": "KL(unedited ‖ edited) per token of the texts about another topic: what the edit changed besides.",
    "written": "What the model writes against a long answer: F1 of the words, ROUGE-L; paraphrase: asked in "
    "other words.",
    "sampled": "100 tokens, top-k 5. Fluency: entropy of word pairs and triples in bits (papers print it × 100; "
    "words by our own tokenizer, close to nltk's), low where text repeats itself. Perplexity: to the unedited model. "
    "PPL_r: that perplexity behind the request over that of the edit itself.",
    "side": "Given texts under the edited model. Perplexity rises when an edit does general harm. KL(unedited ‖ "
    "edited) per token, in nats, sees changes that leave it as it is. Weight change: ‖ΔW‖ / ‖W‖ of the matrix that "
    "changed most. Of edits that hold together it is one measurement.",
    "ability": "Tasks of lm-evaluation-harness on the model as it is, with the edits that hold: share of their items "
    "that are right, with the interval over items (reknow bench --ability).",
    "edit": "Seconds and peak memory of making the patch, the loaded model included; what a method prepares once is "
    "counted where it happens. Stored: what a patch keeps for an edit, in "
    "1000 bytes. Failed: share of edits that could not be made, or not be read.",
}


def environment(*folders: Path) -> Environment:
    """The templates of this room, and of other folders, escaping all that they are given."""
    found = Environment(
        loader=FileSystemLoader([_HERE, *folders]),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["d"] = drawing
    return found


def read_part(name: str) -> str:
    """A file of this room that goes into pages."""
    return (_HERE / name).read_text(encoding="utf-8")


def style_and_script() -> dict[str, str]:
    """What goes into the head of a page: style, script, and the hash by which it allows no other script."""
    colours, style, script = (read_part(name) for name in ("colours.css", "page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"style": Markup(colours + style), "script": Markup(script), "script_hash": f"sha256-{digest}"}


def write_report(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes `report.html`, `report.md`, `report.csv`, `report.tex` and the figures of a run, finished or not.

    Args:
        run_folder: what `bench` wrote.
        out: another folder for the report.

    Returns:
        The path of the HTML page.

    Raises:
        InputError: no run folder, or the report cannot be written.
    """
    results = Results.load(run_folder)
    folder = Path(run_folder if out is None else out)
    figures = plots.make_figures(results)
    verdicts, earlier = _verdicts(results), _pictures_of(folder / "report.md")
    write_text(folder / "report.html", render_page(results, verdicts))
    write_text(folder / "report.csv", results.to_csv())
    write_text(folder / "report.tex", _latex(results, verdicts[:1]))
    write_text(folder / "report.md", _markdown(results, verdicts[:1], figures))
    for file, _, figure in figures:
        atomic_write(folder / file, lambda path, figure=figure: plots.save_png(figure, Path(path)))
    for file in earlier - {each.file for each in figures}:
        (folder / file).unlink(missing_ok=True)
    return folder / "report.html"


def _pictures_of(report: Path) -> set[str]:
    """The pictures beside an earlier report that it shows."""
    text = report.read_text(encoding="utf-8", errors="replace") if report.is_file() else ""
    return set(re.findall(r"^!\[.*\]\((figure\w*\.png)\)$", text, re.MULTILINE))


def _verdicts(results: Results) -> list[Verdict]:
    """One for each protocol that was read; the first is the one that is shown first."""
    entries = entries_of(results)
    return [make_verdict(entries, protocol) for protocol in read_protocols([e for e in entries if e.compared])]


def render_page(results: Results, verdicts: Sequence[Verdict] | None = None) -> str:
    """The page of a run, as HTML; its verdicts are made where they are not given."""
    templates, settings = environment(), results.manifest["settings"]
    entries = entries_of(results)
    verdicts = _verdicts(results) if verdicts is None else verdicts
    protocols = [verdict.protocol for verdict in verdicts]
    draw = templates.get_template("macros.html").module.probes  # type: ignore[attr-defined]
    return templates.get_template("page.html").render(
        **style_and_script(),
        results=results,
        title=_title(results),
        head=contents.describe_head(results),
        facts=contents.describe_run(results),
        entries=entries,
        compared=len(settings["methods"]),
        **answer(entries, verdicts),
        retention=_retention(results, entries, protocols),
        stage=stage_label(results.last_stage),
        stage_label=stage_label,
        cases=list_cases(results, protocols, lambda card: str(draw(card))),
        methods=list(settings["methods"]),
        seeds=len(settings["seeds"]),
        unfinished=contents.describe_rest(results),
        failures=contents.list_failures(results),
    )


def answer(entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What the templates show first, by the names that they have for it: under each protocol the verdict, a sentence
    and the trade-off; and what to read them by."""
    shown = [(each, verdict_sentence(each), drawing.trade_off(entries, each.protocol)) for each in verdicts]
    protocols = [verdict.protocol for verdict in verdicts]
    return {
        "verdicts": shown,
        "protocols": protocols,
        "names": PROTOCOL_NAMES,
        "read": READ,
        "about": about(verdicts),
    }


def _retention(results: Results, entries: list[Entry], protocols: list[str]) -> dict[str, list[drawing.Chart]]:
    """Protocol → what is left of a sequence's edits: by their age, and of all so far."""
    if results.manifest["settings"]["mode"] != "sequential":
        return {}
    compared = [entry for entry in entries if entry.compared]
    found = {}
    for protocol in protocols:
        charts = []
        for column, points, title, across in (
            (NEW, by_age, "New answer by the age of the edit, %", "edits made later →"),
            (NEW, so_far, "New answer of all edits so far, %", "edits made →"),
            (KEPT, so_far, "Others kept by all edits so far, %", "edits made →"),
        ):
            if key := column.key(protocol):
                drawn = {(entry.label, entry.colour): points(results, entry.method, key) for entry in compared}
                charts.append(drawing.curves(title, across, drawn))
        if shown := [chart for chart in charts if chart is not None]:
            found[protocol] = shown
    return found


def _title(results: Results) -> str:
    settings = results.manifest["settings"]
    methods = list(settings["methods"])
    named = ", ".join(methods) if len(methods) <= _NAMED else f"{len(methods)} methods"
    return f"{named} on {settings['dataset'] or 'given cases'}"


def _latex(results: Results, first: Sequence[Verdict]) -> str:
    text, run = results.to_latex(), f"{_title(results)}, {results.manifest['model']}, {len(results.before)} cases"
    for verdict in first:
        text += f"\n{to_latex(verdict_lines(verdict), f'{run}, {PROTOCOL_NAMES[verdict.protocol]}. {_MARKED}')}\n"
    return text


def _markdown(results: Results, first: Sequence[Verdict], figures: Sequence[plots.Picture]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in contents.describe_run(results).items())
    said = "\n\n".join(contents.describe_methods(results))
    for verdict in first:
        name = PROTOCOL_NAMES[verdict.protocol].capitalize()
        said += f"\n\n**{name}**\n\n{to_markdown(verdict_lines(verdict))}\n\n{_MARKED}"
    pictures = "\n\n".join(f"![{each.caption}]({each.file})" for each in figures)
    protocols = dict.fromkeys(table.protocol for table in results.tables())
    read = "\n".join(f"- `{protocol}`: {READ[protocol]}" for protocol in protocols)
    failed = "\n\n".join(results.notes() or ["Failed edits: none."])
    return f"# {_title(results)}\n\n{said}\n\n{facts}\n\n{results.to_markdown()}\n{failed}\n\n{pictures}\n\n{read}\n"
