"""`reknow serve` and `reknow ui` as programs of their own, and clients of OpenAI's library for the former."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
from reknow.__main__ import main
main()
"""


@dataclass
class Served:
    """A server that runs."""

    process: subprocess.Popen
    address: str
    warned: str

    def client(self, token: str = "any") -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=token, max_retries=0, timeout=300)


@contextmanager
def serving(*arguments: object, folder: Path) -> Iterator[Served]:
    """The server on a free port; it is killed at the end, if it still runs."""
    with listening("serve", *arguments, folder=folder) as served:
        yield served


@contextmanager
def listening(command: str, *arguments: object, folder: Path) -> Iterator[Served]:
    """A command that listens on a free port; it is killed at the end, if it still runs."""
    with started("-c", PROGRAM, command, *arguments, "--port", 0, folder=folder) as served:
        yield served


@contextmanager
def started(*words: object, folder: Path, **environment: str) -> Iterator[Served]:
    """A program in Python that says the address at which it listens; it is killed at the end, if it still runs."""
    log = folder / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "REKNOW_PROGRESS": "0"} | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        found = next(filter(None, (re.search(r"http://\S+?:\d+", line) for line in lines)), None)
        assert found, log.read_text()
        yield Served(process, found[0], log.read_text())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
