"""Options that say who does the tasks of a command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from reknow.cli.options import refuse_beside

if TYPE_CHECKING:
    from reknow.engine.jobs import Engine
    from reknow.engine.shards import Shard
    from reknow.lm import LM

__all__ = ["Spreading"]


@dataclass(frozen=True)
class Spreading:
    """Who does the tasks."""

    shard: Annotated[
        str | None,
        typer.Option("--shard", help="I/N: every N-th task from the I-th on, into part files of the same folder."),
    ] = None

    @contextmanager
    def engine(self, open_lm: Callable[[], LM]) -> Iterator[Engine]:
        """Who does the tasks, with models that `open_lm` opens."""
        from reknow.engine.jobs import Local

        self.parse_shard()
        yield Local(open_lm)

    def refuse(self, what: str) -> None:
        """Raises InputError where the tasks are to be shared, beside `what`."""
        refuse_beside(what, {f"--{name}": given for name, given in vars(self).items()})

    def parse_shard(self) -> Shard | None:
        """The shard; raises InputError where it is none."""
        from reknow.engine.shards import Shard

        return None if self.shard is None else Shard.parse(self.shard)
