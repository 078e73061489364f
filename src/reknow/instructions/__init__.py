"""Instructions for editors that read one: task families, who writes instructions, and the search for good ones."""

from reknow.datasets.families import Family, Instruction, family_of, load_card, load_families, save_families
from reknow.instructions.propose import Proposer, Rewriter, Writer
from reknow.instructions.search import Search, SearchResult, search
from reknow.instructions.trial import InstructionScorer

__all__ = [
    "Family",
    "Instruction",
    "InstructionScorer",
    "Proposer",
    "Rewriter",
    "Search",
    "SearchResult",
    "Writer",
    "family_of",
    "load_card",
    "load_families",
    "save_families",
    "search",
]
