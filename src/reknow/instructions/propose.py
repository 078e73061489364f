"""Who writes instructions: a language model behind a chat server, or a seeded rewriter over a bank of phrases."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Protocol

from reknow.datasets.families import Family, Instruction
from reknow.files.llm import LLM
from reknow.instructions.llm import answer_lines

_WORDS = range(4, 41)
"""How long an instruction may be."""


class Proposer(Protocol):
    """Writes instructions."""

    @property
    def name(self) -> str: ...

    def propose(self, family: Family, scored: Sequence[Instruction], count: int, round: int) -> list[str]:
        """Up to `count` instructions that are not among `scored`, the best of which come first.

        Raises:
            NoAnswer: the server does not answer, or not with instructions.
        """
        ...

    def cost(self) -> dict[str, int]:
        """What was spent since the proposer was made."""
        ...


def is_usable(text: str) -> bool:
    """Is it an instruction in form: a sentence of 4 to 40 words on one line, no other braces than `{}`?"""
    rest = text.replace("{}", "")
    return (
        len(text.split()) in _WORDS and text[:1].isupper() and text.endswith(".") and not set("{}\n[]<>") & set(rest)
    )


@dataclass
class Rewriter:
    """Fills forms with phrases: half of the instructions are the best ones with one phrase changed, half are new.

    Works offline and gives the same for the same seed and scores.
    """

    seed: int = 0
    name: str = "rewriter"
    bank: dict = field(
        default_factory=lambda: json.loads((files("reknow") / "assets/phrases.json").read_text("utf-8"))
    )

    def propose(self, family: Family, scored: Sequence[Instruction], count: int, round: int) -> list[str]:
        rng = random.Random(f"{self.seed}/{family.name}/{round}")
        table = {_compose(choice): choice for choice in self._choices(family)}
        parents = [each.text for each in scored if each.text in table][: count // 2 + 1]
        known = {each.text for each in scored}
        proposed: list[str] = []
        for parent in rng.choices(parents, k=count // 2) if parents else ():
            near = [text for text in table if text not in known and _distance(table[text], table[parent]) == 1]
            proposed += rng.sample(near, min(1, len(near)))
            known |= set(proposed)
        fresh = [text for text in table if text not in known]
        return proposed + rng.sample(fresh, min(count - len(proposed), len(fresh)))

    def _choices(self, family: Family) -> list[dict[str, str]]:
        """Every way to fill the forms."""
        goals = self.bank["goals"].get(family.name, self.bank["goals"]["any"])
        slots = {
            "form": self.bank["forms"],
            "opening": self.bank["openings"],
            "goal": goals,
            "limit": self.bank["limits"],
        }
        return [dict(zip(slots, phrases, strict=True)) for phrases in itertools.product(*slots.values())]

    def cost(self) -> dict[str, int]:
        return {}


def _compose(choice: dict[str, str]) -> str:
    text = choice["form"].format(**choice)
    return text[0].upper() + text[1:]


def _distance(one: dict[str, str], other: dict[str, str]) -> int:
    return sum(one[name] != other[name] for name in one)


@dataclass
class Writer:
    """A language model that is given the task, what was tried and what it scored."""

    llm: LLM
    questions: int = 0
    words: int = 0
    """Asked and answered."""

    @property
    def name(self) -> str:
        return f"{self.llm.model} at {self.llm.base_url or 'the default address'}"

    def propose(self, family: Family, scored: Sequence[Instruction], count: int, round: int) -> list[str]:
        known = {each.text for each in scored}
        asked = instruction_question(family, scored, count)
        self.questions += 1
        self.words += len(asked.split())

        def new(answer: str) -> list[str]:
            lines = [line.strip('"') for line in answer_lines(answer)]
            return [line for line in dict.fromkeys(lines) if is_usable(line) and line not in known]

        answer = self.llm.ask(asked, lambda text: bool(new(text)))
        self.words += len(answer.split())
        return new(answer)[:count]

    def cost(self) -> dict[str, int]:
        return {"questions": self.questions, "words sent and received": self.words}


def instruction_question(family: Family, scored: Sequence[Instruction], count: int, shown: int = 8) -> str:
    """What the language model is asked: the task, the best instructions so far with their scores, how many more."""
    tried = "\n".join(
        f"- {each.text} ({', '.join(f'{name} {100 * value:.0f} %' for name, value in each.scores.items())})"
        for each in scored[:shown]
    )
    return (
        "A network edits what a language model says. Before each edit it reads one instruction that tells it what "
        f"kind of edit this is.\nTask: {family.title}. {family.metadata}\n"
        f"Instructions so far, the best first, with what the network reached:\n{tried}\n"
        f"Write {count} other instructions for this task that could score higher. Each is one English sentence of at "
        f"most {_WORDS[-1]} words that ends in a full stop; {{}} stands for the subject of the edit. "
        "Give one instruction per line and nothing else."
    )
