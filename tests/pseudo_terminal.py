"""A program of the command line at a real terminal, slowly: a pass of its model takes a while."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM = """
import signal, sys, time
from reknow.model.decoder import Decoder

forward, pause = Decoder.forward, float(sys.argv.pop(1))

def slowly(self, *args, **options):
    time.sleep(pause)
    return forward(self, *args, **options)

Decoder.forward = slowly
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.argv[0] = "reknow"
from reknow.__main__ import main
main()
"""


class Session:
    """What a person at the terminal sees and types."""

    def __init__(self, process: int, terminal: int):
        self.process, self._terminal, self.seen = process, terminal, ""

    def wait_for(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Reads on until what has been shown since the last match matches; that match."""
        end = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen, re.DOTALL)) is None:
            ready, _, _ = select.select([self._terminal], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {pattern!r}; the terminal shows {self.seen!r}"
            assert self._read(), f"waited for {pattern!r}; the program ended after {self.seen!r}"
        self.seen = self.seen[match.end() :]
        return match

    def _read(self) -> bool:
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # what Linux says of a terminal that nobody writes to any more
            data = b""
        self.seen += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def press_ctrl_c(self) -> None:
        self.type("\x03")

    def end(self) -> int:
        """The exit status, once the program has ended by itself; what it still showed is in `seen`."""
        while self._read():
            pass
        _, status = os.waitpid(self.process, 0)
        self.process = 0
        return os.waitstatus_to_exitcode(status)


@contextmanager
def at_a_terminal(*arguments: object, pass_seconds: float = 0.0, folder: Path | None = None) -> Iterator[Session]:
    """The command at a terminal; a pass of the model takes so many seconds more."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb", "REKNOW_PROGRESS": "0"}
        os.chdir(folder or Path.cwd())
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, str(pass_seconds), *map(str, arguments)])
    session = Session(process, terminal)
    try:
        yield session
    finally:
        if session.process:
            os.kill(session.process, signal.SIGKILL)
            os.waitpid(session.process, 0)
        os.close(terminal)
