"""What a page lets those who open it reach: the machine it runs on is theirs, or it is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Access:
    """What screens read before they offer something."""

    machine: bool = True
    """Whether models, files and folders of the machine may be named, and folders written."""
    runs: Path = Path()
    """The folder below which runs are looked for."""
    works: int | None = None
    """How many works may go on or wait at a time, of all tabs; None: any number."""
    upload: str = "1gb"
    """The largest file that is taken."""


STRANGERS = Access(machine=False, works=8, upload="32mb")
"""On a machine that is not theirs."""
