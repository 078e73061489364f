"""The figures of causal traces, and `reknow trace`."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from conftest import make_lm
from families import slow_but
from reknow.cli import app
from reknow.cli.options import Opening
from reknow.datasets import Fact
from reknow.report.plots import STYLE
from reknow.report.trace_plots import average_figure, effect_bars, save_figure, trace_figure
from reknow.studies.instructedit.gradient_plot import Panel, gradient_figure
from reknow.tracing.causal import Trace, average


def a_trace(answer: str = " $5", layers: int = 4) -> Trace:
    table = torch.linspace(0.1, 0.9, 4 * layers).view(4, layers)
    tables = {kind: table.clone() for kind in ("hidden", "mlp", "attention", "mlp_severed")}
    return Trace("A\nb costs", ("A", "\n", " b", " costs"), (0, 3), answer, 0.9, 0.1, tables, 2)


def texts(path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_a_heat_map_shows_tokens_in_their_words_on_one_scale(tmp_path):
    png, svg = save_figure(trace_figure(a_trace()), tmp_path / "folder" / "one")
    assert png.read_bytes().startswith(b"\x89PNG")
    found = texts(svg)
    assert {"A", "\\n", "b", "costs"} <= set(found)
    assert {"Hidden state", "MLP, 2 layers together", "Attention, 2 layers together", "P($5)"} <= set(found)
    assert found.count("P($5)") == 1, "one scale"
    assert any("clean 0.90, corrupted 0.10" in text for text in found)


@pytest.mark.parametrize(
    "name", slow_but((r"$\frac{1}$", "$_^{"), ("$x$", r"$\frac{1}$", "a_b^c", "$_^{", r"\alpha & %#", "5$ or 6$"))
)
def test_labels_are_no_mathematics(name, tmp_path):
    trace = replace(a_trace(answer=f" {name}"), tokens=(name, "_", f" {name}", " is"))
    _, svg = save_figure(trace_figure(trace), tmp_path / "one")
    found = [html.unescape(text) for text in texts(svg)]
    assert found.count(name) == 2 and "_" in found and f"P({name})" in found
    figure = gradient_figure([Panel("one editor", [name, "b_", "$c"], {"t-SNE": np.eye(3, 2)})])
    kept = save_figure(figure, tmp_path / "points")
    assert {name, "b_", "$c"} <= {html.unescape(text) for text in texts(kept[1])}
    with matplotlib.rc_context(STYLE):
        Figure(figsize=(2, 2)).subplots().set_title(name).figure.savefig(tmp_path / "run.svg")
    assert name in {html.unescape(text) for text in texts(tmp_path / "run.svg")}


def test_averages_are_drawn_with_missing_classes_and_in_the_paper_s_order(tmp_path):
    effects = average([a_trace(), a_trace()])
    _, svg = save_figure(average_figure(effects), tmp_path / "average")
    found = texts(svg)
    assert "Average indirect effect over 2 facts, points of probability" in found
    assert "Further tokens" in found and "nan" not in found
    top = math.floor(100 * float(effects.effects["hidden"][2, 3]) + 0.5)
    assert str(top) in found


def test_bars_carry_intervals(tmp_path):
    one, other = a_trace(), a_trace()
    other.restored["mlp"] += 0.1
    figure = effect_bars(average([one, other]), ("hidden", "mlp"))
    (axes,) = figure.axes
    heights = [container[0].get_height() for container in axes.containers if hasattr(container, "patches")]
    assert heights[1] - heights[0] == pytest.approx(5, abs=1e-3)  # mean of 0 and 10 points more
    _, svg = save_figure(figure, tmp_path / "bars")
    assert "Last subject token: average over 2 facts, 95 % interval" in texts(svg)


def test_a_token_stands_in_its_word_and_the_subject_is_bold():
    trace = replace(a_trace(), prompt="Darrieux is born", tokens=("Dar", "rieux", " is", " born"), subject=(0, 2))
    (first, second, *rest) = [
        [(area.get_text(), area._text.get_weight(), area._text.get_color()) for area in box.offsetbox.get_children()]
        for box in trace_figure(trace).axes[0].artists
    ]
    grey = first[1][2]
    assert first == [("Dar", "bold", "black"), ("rieux", "bold", grey)] and grey != "black"
    assert second == [("Dar", "bold", grey), ("rieux", "bold", "black")]
    assert rest == [[("is", "normal", "black")], [("born", "normal", "black")]]


def test_one_prompt_has_one_scale_from_the_corrupted_to_the_clean_run():
    *panels, bar = trace_figure(a_trace()).axes
    scales = {(image.get_clim(), image.cmap.name) for axes in panels for image in axes.images}
    assert scales == {((0.1, 0.9), "Blues")}
    assert len(panels) == 4 and bar.get_title() == "P($5)"


def test_deep_models_get_few_layer_labels():
    figure = trace_figure(a_trace(layers=48))
    assert [int(label.get_text()) for label in figure.axes[0].get_xticklabels()] == list(range(0, 48, 5))


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def reknow(monkeypatch, tmp_path):
    """Runs `reknow trace` on a tiny model in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Opening, "open", lambda self, model: make_lm("gpt2"))

    def run(*arguments: str):
        return CliRunner().invoke(app, ["trace", *arguments])

    return run


def test_one_prompt_is_traced_and_drawn(reknow, tmp_path):
    result = reknow("The capital of {Peru} is", "--samples", "2", "--severed")
    assert result.exit_code == 0, result.output
    assert re.match(r"With “Peru” corrupted|The (answer|subject) .* here", result.output)
    assert "mlp_severed" in result.output
    assert (tmp_path / "trace" / "trace.png").exists() and (tmp_path / "trace" / "trace.svg").exists()


def test_a_prompt_without_a_subject_is_refused(reknow, tmp_path):
    result = reknow("The capital of Peru is")
    assert result.exit_code == 2
    assert "expected one subject in braces" in result.output
    assert not (tmp_path / "trace").exists()


def test_a_prompt_longer_than_the_model_is_refused(reknow, tmp_path):
    result = reknow("The capital of {Peru} is " + "Lima " * 200)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: expected texts of at most 128 tokens, for which ")
    assert not list((tmp_path / "trace").glob("*.*"))


@pytest.mark.slow
def test_facts_are_traced_once_and_a_killed_run_goes_on(reknow, tmp_path, monkeypatch):
    facts = [Fact("The capital of {} is", name, "Lima") for name in ("Peru", "Zoë", "Apple")]
    monkeypatch.setattr("reknow.datasets.facts.load_facts", lambda *_, limit=None, **__: facts[:limit])
    monkeypatch.setattr("reknow.tracing.many.known_facts", lambda _, some: list(some))
    first = reknow("--limit", "2", "--samples", "2", "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.output)["facts"] == 2
    file = tmp_path / "trace" / "traces.jsonl"
    kept = file.read_text()
    file.write_text(kept + '{"prompt": "The capital of Zoë')  # killed while writing
    again = reknow("--limit", "3", "--samples", "2", "--json")
    assert json.loads(again.output)["facts"] == 3
    assert file.read_text().startswith(kept) and len(file.read_text().splitlines()) == 4
    other = reknow("--limit", "3", "--samples", "3")
    assert other.exit_code == 2 and "change --out or --force" in other.output
    assert reknow("--limit", "3", "--samples", "3", "--force", "--json").exit_code == 0


def test_a_model_that_knows_none_of_the_facts_says_so(reknow):
    result = reknow("--limit", "3", "--samples", "2")
    assert result.exit_code == 2 and "it knows none" in result.output


def test_layers_are_named(reknow):
    result = reknow("--layers")
    assert result.exit_code == 0, result.output
    assert "layer 0 as before: " in result.output
