"""Words in which two texts differ."""

from __future__ import annotations

import pytest

from reknow.texts.differences import differing


def marked(runs) -> str:
    """The text with what differs in brackets."""
    return "".join(f"[{run.text}]" if run.differs else run.text for run in runs)


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ("She speaks French.", "She speaks English.", ("She speaks [French.]", "She speaks [English.]")),
        ("a b c", "a b c", ("a b c", "a b c")),
        ("one  two\nthree", "one two three", ("one  two\nthree", "one two three")),  # blanks count for nothing
        ("in New York now", "in Rome now", ("in [New York] now", "in [Rome] now")),
        ("in Rome", "in old Rome, now", ("in [Rome]", "in [old Rome, now]")),
        ("theatre", "theater", ("[theatre]", "[theater]")),  # words, not letters
        ("首都是巴黎。", "首都是罗马。", ("首都是[巴黎]。", "首都是[罗马]。")),
        ("", "anything at all", ("", "[anything at all]")),
        ("", "", ("", "")),
    ],
)
def test_whole_words_are_marked_on_both_sides_and_nothing_is_lost(one, other, wanted):
    runs = differing(one, other)
    assert tuple(map(marked, runs)) == wanted
    assert ["".join(run.text for run in each) for each in runs] == [one, other]


def test_what_goes_on_where_the_other_one_was_stopped_is_no_difference():
    one, other = "She was a French actress and singer.", "She was an English actress"
    assert [marked(runs) for runs in differing(one, other, unfinished=True)] == [
        "She was [a French] actress and singer.",
        "She was [an English] actress",
    ]
    assert marked(differing(one, other)[0]) == "She was [a French] actress [and singer.]"
    assert marked(differing("a b", "", unfinished=True)[0]) == "a b"
