"""The papers of the methods for bibliographies, from the table `assets/papers.toml`."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from importlib.resources import files
from typing import Any

from reknow.errors import InputError
from reknow.registry import find_row

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

SKIPPED = {"a", "an", "the", "can", "we", "on", "in"}
"""Words of a title that a key does not begin with."""


@lru_cache
def known_papers() -> dict[str, dict[str, Any]]:
    """Each paper by its number on arXiv, or else its name on OpenReview: title, authors and year."""
    return tomllib.loads((files("reknow") / "assets" / "papers.toml").read_text(encoding="utf-8"))


def cite(method: str) -> str:
    """The paper of a method as an entry for BibTeX: `cite("rome")`.

    Raises:
        InputError: no such method, or one that was added without a paper that is known here.
    """
    row = find_row(method)
    number = re.search(r"\b\d{4}\.\d{5}\b|(?<=OpenReview )\w+", row.paper)
    if number is None or number[0] not in known_papers():
        raise InputError(
            f"expected a method whose paper is known; that of {method} is {row.paper!r}: cite it by hand"
        )
    paper = known_papers()[number[0]]
    word = next(word for word in re.findall(r"[a-z]+", paper["title"].lower()) if word not in SKIPPED)
    fields = {
        "title": "{" + paper["title"] + "}",  # braces inside keep its capitals
        "author": " and ".join(paper["authors"]),
        "year": str(paper["year"]),
        "eprint": number[0],
        "archivePrefix": "arXiv" if (on_arxiv := "." in number[0]) else "OpenReview",
        "url": f"https://arxiv.org/abs/{number[0]}" if on_arxiv else f"https://openreview.net/forum?id={number[0]}",
    }
    family = re.findall(r"[^ {}]+", paper["authors"][0])[-1].lower()
    return "\n".join(
        [
            f"@misc{{{family}{paper['year']}{word},",
            *(f"  {name} = {{{value}}}," for name, value in fields.items()),
            "}",
        ]
    )
