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

    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="By Ray: so many processes do the tasks, each with the model."),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="By Ray: the machines of a cluster do them. Its head, HOST:PORT, or auto."),
    ] = None
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of each such process. [1]")] = None

    @contextmanager
    def engine(self, open_lm: Callable[[], LM], device: str | None) -> Iterator[Engine]:
        """Who does the tasks, with models that `open_lm` opens on a device.

        Raises:
            InputError: options that exclude each other.
        """
        from reknow.engine.jobs import Local

        if self.workers is None and self.ray is None:
            refuse_beside("one process", {"--threads": self.threads})
            self.parse_shard()
            yield Local(open_lm)
            return
        refuse_beside("--workers or --ray", {"--shard": self.shard})
        from reknow.engine.on_ray import RayEngine

        gpus, threads = 0 if device is None or device == "cpu" else 1, self.threads or 1
        with RayEngine(open_lm, address=self.ray, workers=self.workers, threads=threads, gpus=gpus) as engine:
            yield engine

    def refuse(self, what: str) -> None:
        """Raises InputError where the tasks are to be shared, beside `what`."""
        refuse_beside(what, {f"--{name}": given for name, given in vars(self).items()})

    def parse_shard(self) -> Shard | None:
        """The shard; raises InputError where it is none."""
        from reknow.engine.shards import Shard

        return None if self.shard is None else Shard.parse(self.shard)
