"""What `bench` and `score` measure besides the edits: options that both have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reknow.cli.options import refuse_beside
from reknow.cli.terminal import say
from reknow.errors import InputError

if TYPE_CHECKING:
    from reknow.engine.jobs import Engine
    from reknow.evaluation import Plan


@dataclass(frozen=True)
class Besides:
    """What is measured besides the edits. What is not given is as the folder has it that a run goes on in."""

    side_effects: Annotated[
        bool | None,
        typer.Option(
            "--side-effects/--no-side-effects",
            help="Perplexity of other text, KL to the unedited model, size of the change. [on]",
        ),
    ] = None
    held_out: Annotated[
        Path | None, typer.Option("--held-out", help="A file of that text, instead of the bundled one.")
    ] = None
    oracle: Annotated[
        bool | None,
        typer.Option("--oracle/--no-oracle", help="Ask the unedited model with the edit in front too. [on]"),
    ] = None
    ability: Annotated[
        str | None,
        typer.Option(
            "--ability",
            help="Tasks of lm-evaluation-harness before and after, with commas: lambada_like, choice, cloze, any of "
            "its own, or a folder.",
        ),
    ] = None

    def tasks(self, mode: str, sets: Iterable[Sized], own_code: bool, *, shared: bool = False) -> list[str]:
        """The tasks that abilities are measured by; none where none is given.

        Raises:
            InputError, MissingExtra: see `check_tasks`; or a mode, or a share of a run, of which they cannot be
                measured.
        """
        if self.ability is None:
            return []
        from reknow.evaluation.ability import refuse_single
        from reknow.evaluation.harness import check_tasks

        names = [name.strip() for name in self.ability.split(",")]
        refuse_single(mode, sum(map(len, sets)), names)
        if shared:
            raise InputError("expected --ability without --shard; got both: give it when all shares are done")
        check_tasks(names, own_code=own_code)
        return names

    def plan(self, plan: Plan, folders: Iterable[Path], *, default: bool) -> Plan:
        """The plan with what is given, or what the manifest of one of the folders says, or else the default.

        Raises:
            InputError: options that exclude each other, or a file without text.
        """
        from reknow.datasets.text import held_out_texts

        if self.held_out is not None and self.side_effects is False:
            raise InputError("expected --held-out without --no-side-effects; got both: leave one out")
        begun = _begun(folders)
        side = self.side_effects if self.held_out is None else True
        oracle = self.oracle
        if begun is not None and side is None:
            texts = begun.get("held_out")
            plan = replace(plan, held_out=tuple(map(str, texts)) if isinstance(texts, list) else ())
        elif side or (side is None and default):
            plan = replace(plan, held_out=held_out_texts(self.held_out))
        elif side is False:
            plan = replace(plan, held_out=())
        if oracle is None:
            oracle = plan.oracle or default if begun is None else bool(begun.get("oracle"))
        return replace(plan, oracle=oracle)

    def refuse(self, what: str) -> None:
        """Raises InputError where anything is given beside `what`."""
        given = {name: value is not None for name, value in vars(self).items()}
        refuse_beside(what, {f"--{name.replace('_', '-')}": there for name, there in given.items()})


def _begun(folders: Iterable[Path]) -> dict[str, Any] | None:
    """The settings of a run that was begun in one of the folders; None: there is none."""
    from reknow.files.manifest import read_manifest
    from reknow.files.outputs import MANIFEST_FILE

    for folder in folders:
        if (folder / MANIFEST_FILE).exists():
            return read_manifest(folder)["settings"]
    return None


def measure_tasks(engine: Engine, folders: Iterable[Path], tasks: Sequence[str]) -> None:
    """Measures abilities in each run folder, where there are tasks, and prints them."""
    from reknow.evaluation.ability import measure_abilities

    for folder in folders if tasks else ():
        engine.ask(partial(measure_abilities, folder=folder, names=tasks))
        say_abilities(folder)


def say_abilities(folder: Path) -> None:
    """Prints the abilities of a run."""
    from reknow.evaluation import Results
    from reknow.texts.tables import to_columns

    for table in Results.load(folder).tables():
        if table.protocol == "ability":
            say("\n  ".join([f"{table.title} ({table.protocol})", *to_columns(table.lines())]), "")
