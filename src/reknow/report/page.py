"""Writes the page: one HTML file that needs nothing else; and Markdown, CSV and pictures."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup

from reknow.evaluation.results import Results
from reknow.evaluation.stages import stage_label
from reknow.files.atomic import atomic_write, write_text
from reknow.report import contents, plots

_CARDS = 5
"""Cases shown with their answers; as many again where something went wrong."""

READ = {
    "teacher_forced_exact": "The answer's tokens are put behind the prompt: 1 if each is the most likely one there.",
    "teacher_forced_tokens": "As above, but the share of such tokens: an answer half right has half the score.",
    "generated": "The model continues the bare prompt by itself with the most likely tokens: 1 if that begins with "
    "an accepted answer, letter case, punctuation and articles aside.",
    "contrast": "ES: on the request the new answer is likelier per token than the true one. PS: so on paraphrases. "
    "NS: on neighbours the true one stays likelier. S: harmonic mean of the three. EM, PM, NM: by how much.",
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
    "edit": "Seconds and peak memory of making the patch, the loaded model included; what a method prepares once is "
    "counted where it happens. Failed: share of edits that could not be made, or not be read.",
}
_MARKS = {"right": "✓ new answer", "wrong": "✗ not the new answer", "same": "✓ as before", "changed": "✗ changed"}
_KINDS = {
    "reliability": "the request's own prompt gives the new answer",
    "generalization": "so do paraphrases of it",
    "locality": "other questions are answered as before the edit, whether that was right or wrong",
    "portability": "what follows from the new fact follows",
}


def write_report(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes `report.html`, `report.md`, `report.csv` and the figures of a run, finished or not.

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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = list(contents.make_cards(results))
    page = environment.get_template("page.html").render(
        results=results,
        title=_title(results),
        headline=contents.describe_methods(results),
        facts=contents.describe_run(results),
        figures={caption: Markup(plots.to_svg(figure)) for caption, figure in figures.items()},
        protocol_names=plots.protocol_colours(results),
        stage=stage_label(results.last_stage),
        stage_label=stage_label,
        cards=shown[:_CARDS],
        missed=[card for card in shown[_CARDS:] if card.missed][:_CARDS],
        unfinished=contents.describe_rest(results),
        failures=contents.list_failures(results),
        read=READ,
        marks=_MARKS,
        kinds=_KINDS,
    )
    write_text(folder / "report.html", page)
    write_text(folder / "report.csv", results.to_csv())
    write_text(folder / "report.md", _markdown(results, list(figures)))
    for number, figure in enumerate(figures.values(), 1):
        atomic_write(folder / f"figure{number}.png", lambda path, figure=figure: plots.save_png(figure, Path(path)))
    return folder / "report.html"


def _title(results: Results) -> str:
    settings = results.manifest["settings"]
    return f"{', '.join(settings['methods'])} on {settings['dataset'] or 'given cases'}"


def _markdown(results: Results, captions: list[str]) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in contents.describe_run(results).items())
    said = "\n\n".join(contents.describe_methods(results))
    pictures = "\n\n".join(f"![{caption}](figure{number}.png)" for number, caption in enumerate(captions, 1))
    protocols = dict.fromkeys(table.protocol for table in results.tables())
    read = "\n".join(f"- `{protocol}`: {READ[protocol]}" for protocol in protocols)
    failed = "\n\n".join(results.notes() or ["Failed edits: none."])
    return f"# {_title(results)}\n\n{said}\n\n{facts}\n\n{results.to_markdown()}\n{failed}\n\n{pictures}\n\n{read}\n"
