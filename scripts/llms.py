"""Writes llms.txt, a list of the documentation's pages for language models, from the site's navigation.

    python scripts/llms.py          # llms.txt (links into docs/) and docs/llms.txt (links within the site)

A page is said to be what its first sentence says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def site_settings() -> dict[str, Any]:
    """What mkdocs.yml says."""
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def list_pages(nav: list, section: str = "") -> Iterator[tuple[str, str]]:
    """(top section, page) of everything in a navigation, in its order."""
    for entry in nav:
        named = entry if isinstance(entry, dict) else {"": entry}
        for name, inside in named.items():
            if isinstance(inside, list):
                yield from list_pages(inside, section or name)
            else:
                yield section or name, inside


def _summary(page: str) -> tuple[str, str]:
    """A page's title and its first sentence, without markup."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").removeprefix("\ufeff")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    title, _, rest = text.lstrip().partition("\n")
    rest = rest.partition("## What it does\n")[2] or rest  # pages of methods begin with names and papers
    rest = re.sub(r"^```.*?^```$", "", rest, flags=re.DOTALL | re.MULTILINE)
    paragraphs = (part.strip("\n") for part in re.split(r"\n{2,}", rest))
    first = next((part for part in paragraphs if re.match(r"[\w\[`\"“*]", part) and not part.startswith("* ")), "")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(first.split())).replace("**", "")
    sentence = re.split(r"(?<=[^A-Z.][.:?!]) (?=[A-Z`])", plain)[0].rstrip(":")
    return title.lstrip("# ").strip(), sentence


def write_list(place: str) -> str:
    """The list whose links begin with `place`: "docs/" for the repository, "" for the site."""
    site = site_settings()
    lines, section = [f"# {site['site_name']}", "", f"> {site['site_description']}", ""], None
    for part, page in list_pages(site["nav"]):
        if part != section:
            lines += [*([""] if section else []), f"## {part}", ""]
            section = part
        title, sentence = _summary(page)
        address = page if place else re.sub(r"(^|/)index\.md$", r"\1", page).removesuffix(".md")
        if not place and address and not address.endswith("/"):
            address += "/"
        lines.append(
            f"- [{title}]({place}{address or './'}): {sentence}" if sentence else f"- [{title}]({place}{address})"
        )
    return "\n".join(lines) + "\n"


FILES = {ROOT / "llms.txt": "docs/", ROOT / "docs" / "llms.txt": ""}
"""Each list and what its links begin with."""

if __name__ == "__main__":
    for path, begins in FILES.items():
        path.write_text(write_list(begins), encoding="utf-8")
