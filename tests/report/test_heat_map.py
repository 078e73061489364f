"""The heat map of a page: where cells lie, one scale, escaped texts."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

from reknow.report.heat_map import WIDTH, draw_trace, scale_of
from reknow.report.page import environment
from reknow.report.trace_words import sentence_of
from reknow.tracing.causal import Trace


def a_trace(clean: float = 0.9, corrupted: float = 0.1, layers: int = 4) -> Trace:
    table = torch.linspace(0.0, 1.0, 3 * layers).view(3, layers)
    tables = {"hidden": table, "mlp": 1 - table, "attention": torch.full((3, layers), math.nan)}
    return Trace("Lima is", ("Li", "ma", " is"), (0, 2), " big", clean, corrupted, tables, 2)  # type: ignore[arg-type]


def drawn(trace: Trace) -> str:
    module = environment().get_template("macros.html").module
    return str(module.heat_map(draw_trace(trace)))  # type: ignore[attr-defined]


def test_colours_go_from_the_corrupted_to_the_clean_run_in_all_panels():
    found = draw_trace(a_trace())
    shares = [[cell.share for cell in panel.cells] for panel in found.panels]
    assert shares[0][0] == 0 and shares[0][-1] == 1, "what lies outside the scale has the colour of its end"
    assert shares[0][5] == pytest.approx((5 / 11 - 0.1) / 0.8, abs=1e-3)
    assert shares[1] == pytest.approx([1 - share for share in shares[0]], abs=2e-3)
    assert shares[2] == [None] * 12
    assert found.scale == (("10.0 %", "subject corrupted"), ("50.0 %", ""), ("90.0 %", "as it is"))


@pytest.mark.parametrize("clean", [0.1, 0.102, 0.05])
def test_where_the_subject_does_not_matter_small_differences_look_small(clean):
    trace = a_trace(clean, 0.1)
    trace.restored["hidden"] *= 0.12
    del trace.restored["mlp"]
    assert scale_of(trace) == (0.0, pytest.approx(0.12), ("", ""))


def test_a_trace_of_nothing_but_zeros_is_drawn():
    trace = a_trace(0.0, 0.0)
    for table in trace.restored.values():
        table.zero_()
    assert {cell.share for panel in draw_trace(trace).panels for cell in panel.cells} == {0.0}


@pytest.mark.parametrize("layers", [1, 6, 30, 96])
def test_cells_fill_a_panel_beside_the_labels(layers):
    found = draw_trace(a_trace(layers=layers))
    cells = found.panels[0].cells
    assert [(cell.token, cell.layer) for cell in cells] == [(t, n) for t in range(3) for n in range(layers)]
    assert cells[0].x == found.left and cells[-1].x + found.cell[0] == pytest.approx(WIDTH, abs=0.1)
    assert cells[-1].y + found.cell[1] == found.bottom < found.height
    assert len(found.panels[0].ticks) <= 12 and found.panels[0].ticks[0][1] == 0
    assert all(y < cell.y + found.cell[1] for (y, _), cell in zip(found.labels, cells[::layers], strict=True))


def test_the_picture_says_what_it_shows_and_what_each_cell_is():
    trace = a_trace()
    text = drawn(trace)
    assert text.count("<svg") == 3 and text.count("<rect") == 36 and text.count("<title>") == 36
    assert text.count('class="ends"') == 1, "one legend"
    cell = re.search(r'<rect class="cell" data-kind="mlp" data-token="1" data-layer="2"[^>]*><title>(.*?)<', text)
    assert cell and cell[1] == "“ma”, layer 2: 45.5 %"
    assert '<rect class="cell untraced" data-kind="attention" data-token="0" data-layer="0"' in text
    assert "“Li”, layer 0: not traced" in text
    assert sentence_of(trace).split("“")[0] in text
    assert "MLP, 2 layers together" in text and ">Hidden state<" in text
    labels = re.findall(r'<text class="token"[^>]*?( text-decoration="underline")?>(.*?)</text>', text)
    plain = [(bool(marked), re.sub(r"<[^>]*>", "", label)) for marked, label in labels]
    assert plain == [(True, "Lima"), (True, "Lima"), (False, "is")] * 3


def test_texts_of_others_are_texts():
    name = "</title><script>alert(1)</script>\"'&amp;"
    trace = replace(a_trace(), prompt=f"{name} is", tokens=(name[:9], name[9:], " is"), answer=f" {name}")
    text = drawn(trace)
    assert "<script" not in text and "</title><" not in text.replace("</title></rect>", "")
    assert "&lt;script&gt;" in text and "&amp;amp;" in text
