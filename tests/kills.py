"""Kills a process at any step of what it does to the disk."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable
from pathlib import Path

import reknow.files.atomic
from reknow.export import gguf_files, gguf_model

STEPS = (
    (os, "rename"),
    (os, "replace"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "rmdir"),
    (os, "unlink"),
    (os, "truncate"),
    (os, "chmod"),
    (builtins, "open"),
    (Path, "write_text"),
    (Path, "touch"),
    (reknow.files.atomic, "_exchange"),
    (gguf_files, "_copy"),
    (gguf_model, "_edited"),
    (gguf_model, "fill_note"),
)
"""Every call by which a process changes what is on the disk, but for the content of tensors' files; of GGUF files
that too, field by field and tensor by tensor."""


def watched(step: Callable[[], None]) -> None:
    """Calls `step` before each of them from here on; nothing is brought to the disk, which a kill does not need."""
    for owner, name in STEPS:
        real = getattr(owner, name) if name != "fsync" else lambda *_: None

        def call(*arguments, real=real, **options):
            step()
            return real(*arguments, **options)

        setattr(owner, name, call)


def run(action: Callable[[], object], kill_at: int | None = None) -> int:
    """Runs the action in a process of its own, which is killed before step `kill_at`; the number of its steps."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        watched(step)
        try:
            action()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}"[:500].encode())
            os._exit(1)
        os.write(writing, str(count).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    assert status == 0, said
    return int(said)
