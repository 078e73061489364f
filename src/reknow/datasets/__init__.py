"""Benchmarks as cases, known facts, plain text and users' edit files.

A data set is one line in the table `DATASETS` (cases to edit and examine) or `FACTS` (true statements).
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reknow.datasets.cases import load_cases, parse_address
    from reknow.datasets.edits_file import load_edits
    from reknow.datasets.facts import FACTS, Fact, load_facts
    from reknow.datasets.forms import DATASETS
    from reknow.datasets.text import sample_text

__all__ = ["DATASETS", "FACTS", "Fact", "load_cases", "load_edits", "load_facts", "parse_address", "sample_text"]

_HOMES = {
    "DATASETS": "forms",
    "FACTS": "facts",
    "Fact": "facts",
    "load_cases": "cases",
    "load_edits": "edits_file",
    "load_facts": "facts",
    "parse_address": "cases",
    "sample_text": "text",
}


def __getattr__(name: str):
    """Imports a name when it is first used: who wants plain text needs no reader of benchmarks."""
    if name not in _HOMES:
        raise AttributeError(f"module 'reknow.datasets' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"reknow.datasets.{_HOMES[name]}"), name)
    return value
