"""Instructions for editors that read one: task families, who writes instructions, and the search for good ones."""

from reknow.datasets.families import Family, Instruction, family_of, load_card, load_families, save_families
from reknow.instructions.propose import Proposer, Rewriter, Writer
from reknow.instructions.search import Found, Search, search
from reknow.instructions.trial import Trial

__all__ = [
    "Family",
    "Found",
    "Instruction",
    "Proposer",
    "Rewriter",
    "Search",
    "Trial",
    "Writer",
    "family_of",
    "load_card",
    "load_families",
    "save_families",
    "search",
]
