"""Ray does the tasks: workers on this machine, or on those of a cluster, each with the model or a GPU of its own."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from reknow.engine.handing_out import MOST_DEATHS, Died, Done, Kept, Made, Ready, hand_out
from reknow.engine.jobs import Job, Task
from reknow.engine.signals import Terminations
from reknow.engine.worker import Worker
from reknow.errors import EngineError, InputError, MissingExtra
from reknow.lm import LM
from reknow.progress import progress

__all__ = ["RayEngine"]

_T = TypeVar("_T")

_LOOK = 5.0
"""Seconds after which who waits for a worker looks whether there can be one."""
_REACH = 5.0
"""Seconds within which the head of a cluster must answer."""


class RayEngine:
    """Workers by Ray. The first that is needed starts all; `close`, or the end of a `with`, ends them.

    Where Ray runs in this process already it is used as it is, and goes on.

    Args:
        open_lm: opens the model; called once by each worker.
        address: of a cluster's head, `HOST:PORT`, or `auto` for the one that this machine belongs to; None: a cluster
            on this machine alone, which ends with the engine.
        workers: how many; None: as many as there is room for, one on each GPU where they ask for one.
        threads: of each worker. Rows are the same to the last bit where these are.
        gpus: of each worker.

    Raises:
        MissingExtra: Ray is not installed.
        InputError: there is no cluster at the address, or it has no room for one worker.
    """

    def __init__(
        self,
        open_lm: Callable[[], LM],
        *,
        address: str | None = None,
        workers: int | None = None,
        threads: int = 1,
        gpus: int = 0,
    ):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
        try:
            import ray
        except ImportError:
            raise MissingExtra("ray", "ray", "spreading tasks over processes") from None
        self._ray: Any = ray
        self._open, self._address, self._wanted, self._threads, self._gpus = open_lm, address, workers, threads, gpus
        self._workers: _RayWorkers | None = None
        self._folder: Path | None = None
        self._ours = False
        self._terminations = Terminations()

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, and Ray where it was started here."""
        if self._workers is not None:
            self._workers.end()
            self._workers = None
        if self._ours:
            self._ours = False
            self._ray.shutdown()
        self._terminations.restore()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def ask(self, question: Callable[[LM], _T]) -> _T:
        with self._terminations.told():
            return self._started().ask(question)

    def perform(
        self,
        job: Job,
        tasks: Sequence[Task],
        there: Container[tuple],
        keep: Callable[[dict[str, Any]], object],
        folder: Path | None,
    ) -> None:
        try:
            with self._terminations.told():
                workers = self._started()
                workers.begin(job)
                hand_out(workers, job, tasks, there, keep, folder)
        except BaseException:
            self.close()  # its workers are in the midst of tasks
            raise

    def _started(self) -> _RayWorkers:
        if self._workers is None:
            with progress.stage("starting Ray"):
                self._connect()
                count = self._count()
                options = {"num_cpus": self._threads, "num_gpus": self._gpus}
                self._workers = _RayWorkers(self._ray, self._open, count, self._threads, options)
        return self._workers

    def _connect(self) -> None:
        """Connects to the cluster, or starts one, without a word on standard output and without its own signals."""
        if self._ray.is_initialized():
            return
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR}
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            with self._terminations.kept():
                if self._address is None:
                    count = (self._wanted or os.cpu_count() or 1) * self._threads
                    self._folder = Path(tempfile.mkdtemp(prefix="rk", dir="/tmp" if os.path.isdir("/tmp") else None))
                    self._ray.init(num_cpus=count, include_dashboard=False, _temp_dir=str(self._folder), **quiet)
                else:
                    _check_address(self._address)
                    self._ray.init(address=self._address, **quiet)
        except (ConnectionError, OSError, ValueError, RuntimeError, self._ray.exceptions.RayError) as error:
            raise _no_cluster(self._address, error) from error
        self._ours = True
        # Else it prints the deaths of workers among our tables.
        self._ray._private.worker._worker_logs_enabled = False

    def _count(self) -> int:
        """How many workers there will be; raises InputError where there is no room for one."""
        there = self._ray.cluster_resources()
        room = int(there.get("CPU", 0) // self._threads)
        if self._gpus:
            room = min(room, int(there.get("GPU", 0) // self._gpus))
        if not room:
            raise InputError(
                f"expected room for a worker with {self._threads} cores and {self._gpus} GPUs; the cluster has "
                f"{there.get('CPU', 0):g} cores and {there.get('GPU', 0):g} GPUs: ask for less (--threads, --device)"
            )
        return min(self._wanted or room, room)


class _RayWorkers:
    """The workers of one engine, by number, each an actor of Ray's."""

    def __init__(self, ray: Any, open_lm: Callable[[], LM], count: int, threads: int, options: dict[str, Any]):
        self._ray, self._open, self._threads, self._options = ray, open_lm, threads, options
        self._kind = ray.remote(max_restarts=0, max_task_retries=0)(Worker)
        self._job: Any = None
        self._actors: dict[int, Any] = {}
        self._beginning: dict[Any, int] = {}
        """What comes when a worker is ready → its number."""
        self._streams: dict[Any, int] = {}
        """What comes of a task → the number of its worker."""
        self._ready: set[int] = set()
        for worker in range(count):
            self._start(worker)

    def _start(self, worker: int) -> None:
        self._actors[worker] = self._kind.options(**self._options).remote(self._open, self._threads)
        self._beginning[self._actors[worker].begin.remote(self._job)] = worker

    def begin(self, job: Job) -> None:
        """Gives all workers a job."""
        self._job = self._ray.put(job)
        self._beginning = {actor.begin.remote(self._job): worker for worker, actor in self._actors.items()}

    def ask(self, question: Callable[[LM], _T]) -> _T:
        """What a function says of the model of a worker that has it."""
        reason = ""
        for _ in range(MOST_DEATHS):
            while not self._ready:
                event = self.wait()
                if isinstance(event, Died):
                    reason = event.reason
                    self.restart(event.worker)
                    break
            else:
                worker = min(self._ready)
                try:
                    return self._get(self._actors[worker].ask.remote(question))
                except _Lost as lost:
                    reason = str(lost)
                    self.restart(worker)
        raise EngineError(
            f"expected workers that last; {MOST_DEATHS} in a row ended, the last one because: {reason}: give them "
            "more memory (fewer --workers)"
        )

    def wait(self) -> Ready | Made | Kept | Done | Died:
        while True:
            waiting = [*self._beginning, *self._streams]
            try:
                coming, _ = self._ray.wait(waiting, num_returns=1, timeout=_LOOK)
            except self._ray.exceptions.RayError as error:
                raise EngineError(
                    f"expected a Ray cluster that lasts; got {_first_line(error)}: start it again, and then this "
                    "command, which goes on where it was"
                ) from error
            if not coming:
                self._check_room()
                continue
            event = self._begun(coming[0]) if coming[0] in self._beginning else self._next(coming[0])
            if event is not None:
                return event

    def _begun(self, ref: Any) -> Ready | Died:
        worker = self._beginning.pop(ref)
        try:
            self._get(ref)
        except _Lost as lost:
            return Died(worker, str(lost))
        self._ready.add(worker)
        return Ready(worker)

    def _next(self, stream: Any) -> Made | Kept | Done | Died | None:
        worker = self._streams[stream]
        try:
            word, said = self._get(next(stream))
        except StopIteration:
            del self._streams[stream]
            return Done(worker)
        except _Lost as lost:
            del self._streams[stream]
            return Died(worker, str(lost))
        if word == "row":
            return Made(worker, said)
        if word == "file":
            return Kept(worker, *said)
        warnings.warn(said, stacklevel=2)
        return None

    def _get(self, ref: Any) -> Any:
        """What a worker gives; raises what it raised, and _Lost where it has ended."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayError as error:
            raise _Lost(_first_line(error)) from error

    def give(self, worker: int, task: Any, there: frozenset[tuple], files: dict[str, bytes]) -> None:
        stream = self._actors[worker].do.options(num_returns="streaming").remote(task, there, files)
        self._streams[stream] = worker

    def restart(self, worker: int) -> None:
        self._kill(worker)
        self._ready.discard(worker)
        self._start(worker)

    def _check_room(self) -> None:
        """Raises EngineError where no worker is left, and the cluster has no room for another."""
        if self._streams:
            return
        there = self._ray.cluster_resources()
        if there.get("CPU", 0) < self._options["num_cpus"] or there.get("GPU", 0) < self._options["num_gpus"]:
            raise EngineError(
                "expected machines for the workers; the cluster has lost them: start some, and then this command "
                "again, which goes on where it was"
            )

    def _kill(self, worker: int) -> None:
        with suppress(Exception):  # it is dead, or its machine is
            self._ray.kill(self._actors[worker])

    def end(self) -> None:
        """Ends all workers."""
        for worker in self._actors:
            self._kill(worker)
        self._actors, self._beginning, self._streams = {}, {}, {}


class _Lost(Exception):
    """A worker has ended."""


def _first_line(error: Exception) -> str:
    """The first line of what Ray says, without its address."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _check_address(address: str) -> None:
    """Raises OSError where nobody answers there, which Ray would try for minutes; InputError: it is no address."""
    if address == "auto":
        return
    host, found, port = address.rpartition(":")
    if not found or not port.isdigit() or "/" in address:
        raise InputError(
            f"expected the address of a cluster's head as HOST:PORT, or auto; got {address!r}: run the command on a "
            "machine of the cluster"
        )
    socket.create_connection((host.strip("[]"), int(port)), _REACH).close()


def _no_cluster(address: str | None, error: Exception) -> Exception:
    if isinstance(error, InputError):
        return error
    if address is None:
        return EngineError(
            f"expected Ray to start on this machine; got {_first_line(error)}: make room in /tmp and memory, or "
            "share the work by --shard"
        )
    return InputError(
        f"expected a Ray cluster at {address} that this machine belongs to; got {_first_line(error)}: start one with "
        "`ray start --head`, or let --workers N start one here"
    )
