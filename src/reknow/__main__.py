"""The program `reknow`; `python -m reknow` is for launchers that start a module."""

import signal
import sys

from reknow.errors import Terminated


def main() -> None:
    """Runs the command line, which SIGTERM ends as Ctrl-C does, both from the first moment on."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # who ignores it wants that of its children too
        signal.signal(signal.SIGTERM, _terminate)
    try:
        from reknow.cli import main as run  # late: one may be stopped while it is imported
    except KeyboardInterrupt as stop:
        print("stopped: nothing was begun", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    run()


def _terminate(*_signal) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
