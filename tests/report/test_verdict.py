"""The verdict: who is best, who cannot be told from the best, and what has no interval."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reknow.evaluation.results import Results
from reknow.report.contents import make_cards
from reknow.report.drawing import trade_off
from reknow.report.verdict import about, entries_of, make_verdict, read_protocols, verdict_sentence
from synthetic_runs import make_results


def cells_of(results: Results, method: str) -> dict:
    verdict = make_verdict(entries_of(results), "generated")
    line = next(line for line in verdict.lines if line.entry.label == method)
    return {column.name: cell for column, cell in zip(verdict.columns, line.cells, strict=True)}


def test_the_best_is_marked_and_who_cannot_be_told_from_it():
    results = make_results(
        {"good": ([1] * 20, [1] * 10 + [0] * 10), "near": ([1] * 19 + [0], [1] * 20), "bad": ([0] * 20, [1] * 20)}
    )
    protocols = ["generated", "teacher_forced_exact", "teacher_forced_tokens", "match"]
    assert read_protocols(entries_of(results)) == protocols
    marks = {method: [cells_of(results, method)[name].mark for name in ("new answer", "other facts kept")]
             for method in ("good", "near", "bad")}  # fmt: skip
    assert marks == {"good": ["best", ""], "near": ["tied", "best"], "bad": ["", "best"]}
    assert verdict_sentence(make_verdict(entries_of(results), "generated")).startswith(
        "near is best, or level with the best, in all that was asked: new answer 95 %, other facts kept 100 %"
    )


def test_where_none_is_best_in_all_it_says_who_is_in_what():
    results = make_results({"one": ([1] * 20, [0] * 20), "two": ([0] * 20, [1] * 20)})
    sentence = verdict_sentence(make_verdict(entries_of(results), "generated"))
    assert sentence == "None is best in all: one in new answer; two in other facts kept."
    alike = make_results({"one": ([1, 0], [1, 1]), "two": ([1, 0], [1, 1])})
    assert "no difference between one and two" in verdict_sentence(make_verdict(entries_of(alike), "generated"))
    alone = make_results({"one": ([1, 0], [1, 1])})
    sentence = verdict_sentence(make_verdict(entries_of(alone), "generated"))
    assert sentence == "one: new answer 50 %, other facts kept 100 %."
    assert not any(cell.mark for cell in cells_of(alone, "one").values())


def test_what_edits_share_has_no_interval_and_says_so():
    together = make_results({"one": ([1] * 6, [1] * 6), "two": ([1] * 6, [1] * 6)}, together=6)
    cell = cells_of(together, "one")["time per edit"]
    assert (cell.text, cell.interval, cell.mark) == ("0.5 s", "mean of 6 made together", ""), "as the other"
    for text in (str(together), together.to_markdown()):
        assert "0.50 (mean of 6 made together)" in text and "100.0 (mean of 6 made together)" in text
    line = next(line for line in together.to_csv().splitlines() if line.startswith("one,after_edit,seconds"))
    assert line == "one,after_edit,seconds,edit,0.5,,,6,6"


def test_numbers_are_read_as_people_do():
    results = make_results({"one": ([1, 1, 0], [1, 1, 1])})
    cells = cells_of(results, "one")
    assert cells["other facts kept"].interval == "in all 3" and cells["stored per edit"].text == "4 kB"
    assert (cells["perplexity"].before, cells["perplexity"].text) == ("20.00", "21.00")
    unedited = cells_of(results, "unedited")
    assert unedited["new answer"].interval == "in none of 3" and unedited["other facts kept"] is None


@pytest.mark.parametrize("count", [1, 3, 17])
def test_labels_of_the_picture_do_not_lie_on_each_other(count):
    shares = [[1] * (20 - i) + [0] * i for i in range(count)]
    results = make_results({f"method-{i}": (share, share[::-1]) for i, share in enumerate(shares)})
    picture = trade_off(entries_of(results), "generated")
    assert picture is not None and len(picture.dots) == count
    boxes = []
    for dot in picture.dots:
        width = 8.4 * len(dot.label)
        left = dot.text_x - (width if dot.anchor == "end" else 0)
        boxes.append((left, dot.text_y - 12, left + width, dot.text_y + 4))
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= 440
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 0.1 or b[3] <= a[1] + 0.1


def test_what_a_judge_said_can_be_chosen():
    results = make_results({"one": ([1, 0], [1, 0])})
    added = {key: {"reliability@judged": 1.0, "generalization@judged": 0.5} for key in results.rows}
    judged = replace(results, added=added)
    assert "judged" in read_protocols(entries_of(judged)) and "judged" not in read_protocols(entries_of(results))
    verdict = make_verdict(entries_of(judged), "judged")
    assert [cell.text for cell in verdict.lines[-1].cells[:3] if cell] == ["100", "50", "50"], "kept: as generated"
    scores = [card.scores["judged"]["one"] for card in make_cards(judged)]
    assert scores == [(1.0, 1, 0.5, 1, 1.0, 1), (1.0, 1, 0.5, 1, 0.0, 1)]


def test_abilities_are_columns_whose_pairs_are_items():
    results = make_results({"kind": ([1] * 4, [1] * 4), "harsh": ([1] * 4, [1] * 4)})
    stages = {("unedited", "before"): [1.0] * 10, ("kind", "after_edit"): [1.0] * 9 + [0.0]}
    stages["harsh", "after_edit"] = [0.0] * 8 + [1.0] * 2
    rows = [{"method": m, "stage": s, "task": "cloze", "seed": 0, "values": v} for (m, s), v in stages.items()]
    found = replace(results, abilities={(row["method"], row["stage"], "cloze"): row for row in rows})
    kind, harsh = (cells_of(found, method)["cloze"] for method in ("kind", "harsh"))
    assert (kind.before, kind.text, kind.mark, harsh.text, harsh.mark) == ("100", "90", "best", "20", "")
    assert "cloze" in about([make_verdict(entries_of(found), "generated")])
    assert entries_of(found)[-1].values("cloze@ability")["9"] == 1.0
