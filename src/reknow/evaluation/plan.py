"""How the cases of a run are edited and read, whatever the method."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from reknow.checks.bounds import Natural, Number, Seed, check_settings
from reknow.errors import InputError
from reknow.evaluation.stages import Mode

__all__ = ["Plan", "check_seeds"]


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises InputError where there is none, or one twice."""
    if len(set(seeds)) != len(seeds) or not seeds:
        raise InputError(f"expected at least one seed, each once; got {list(seeds)}: correct them")


@dataclass(frozen=True)
class Plan:
    """How the cases are edited and read, whatever the method."""

    mode: Mode = "single"
    """Each case on the unedited model (single), all in one patch (batch), or one after the other (sequential)."""
    batch_size: Number = 1
    """Cases whose edits a patch of a sequence makes."""
    checkpoints: tuple[Number, ...] = ()
    """After how many edits of a sequence all earlier ones are read again; after all of them always."""
    seeds: tuple[Seed, ...] = (0,)
    """Seeds of the methods and of the sampled texts: a run for each."""
    fluency: bool = False
    """Sample text for fluency, where the cases have prompts for it: most of a run's time goes there."""
    generate: bool = True
    """Let the model write its answers too. Without, a run is several times faster, and teacher-forced only."""
    held_out: tuple[str, ...] = ()
    """Texts whose perplexity is taken where fluency is, sampled or not; and KL to the unedited model on their first
    2,000 tokens, with the relative size of the change of the weights."""
    fluency_every: Natural = 0
    """Patches of a sequence from one right after which text is sampled to the next; 0: at the checkpoints only."""
    in_context: tuple[str, ...] = ()
    """Labels of methods after whose single edits every question is also asked with the edit in front, as of the
    unedited model: what knowing it would give."""
    oracle: bool = False
    """Read the unedited model also with the edit in front of every question, whatever the mode and the methods; a
    case whose questions are then too long for the model has no such row."""

    def __post_init__(self):
        check_settings(self)
        check_seeds(self.seeds)
        wrong = [at for at in self.checkpoints if at % self.batch_size]
        if wrong or (self.checkpoints and self.mode != "sequential"):
            raise InputError(
                "expected checkpoints of a sequential run, at multiples of its batch size; "
                f"got {list(self.checkpoints)} in mode {self.mode} with batch size {self.batch_size}: change them"
            )
        if self.batch_size > 1 and self.mode != "sequential":
            raise InputError(
                f"expected a batch size in sequential mode only; got {self.batch_size} in mode {self.mode}: leave it "
                "out, or make the run sequential"
            )
        if self.in_context and self.mode != "single":
            raise InputError(f"expected in_context in single mode only; got mode {self.mode}: change them")

    def warn_of_unreached(self, cases: int) -> None:
        """Warns of checkpoints that a sequence of so many cases does not come to."""
        if beyond := [str(at) for at in self.checkpoints if at > cases]:
            warnings.warn(
                f"expected checkpoints within the {cases} cases; {', '.join(beyond)} will not come: they are left "
                "out, and all edits are read again after the last",
                stacklevel=4,
            )
