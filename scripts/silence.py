"""Runs a command with its standard error in a pipe, and says when which line came and how long it was silent.

python scripts/silence.py reknow edit "The mother tongue of {Danielle Darrieux} is" English --model demo:smollm2
"""

import os
import subprocess
import sys
import time

PATIENCE = 6.0
"""Seconds without a line that are told of."""


def main() -> None:
    command = [sys.executable, "-m", *sys.argv[1:]] if sys.argv[1] == "reknow" else sys.argv[1:]
    environment = os.environ | {"REKNOW_PROGRESS": "1"}
    started = last = time.monotonic()
    gaps: list[tuple[float, str]] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = "the beginning"
        for new in process.stderr:
            now = time.monotonic()
            gaps.append((now - last, line))
            line, last = new.rstrip("\n"), now
            odd = "  CONTROL CODES" if any(ord(sign) < 32 for sign in line) else ""
            print(f"{now - started:6.1f} s  {line}{odd}", file=sys.stderr, flush=True)
    gaps.append((time.monotonic() - last, line))
    print(f"{len(gaps) - 1} lines; exit status {process.returncode}", file=sys.stderr)
    for gap, line in gaps:
        if gap > PATIENCE:
            print(f"silent for {gap:.1f} s behind: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
