"""Ctrl-C and SIGTERM: one sentence and the customary status, whenever they come."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from reknow.cli.failures import exit_status

STATUS = {"SIGINT": 130, "SIGTERM": 143}


def stopped(signal: str, where: str, *arguments: str, hidden: bool = False) -> subprocess.CompletedProcess[str]:
    """The program, to which the signal comes as it begins to import `where`; `hidden`: which makes an error of it."""
    code = (
        "import importlib.abc, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "class Kill(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {where!r}:\n"
        "            try:\n"
        f"                os.kill(os.getpid(), signal.{signal})\n"
        f"            except {'KeyboardInterrupt' if hidden else '()'}:\n"
        "                raise RecursionError\n"
        "sys.meta_path.insert(0, Kill())\n"
        "from reknow.__main__ import main; main()"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("where", ["typer", "reknow.cli.editing", "torch._C"])
@pytest.mark.parametrize("signal", STATUS)
def test_a_signal_while_modules_are_imported_is_one_line(signal, where):
    result = stopped(signal, where, "show", "nowhere.patch")
    assert result.returncode == STATUS[signal] and result.stdout == ""
    assert result.stderr.startswith("stopped: ") and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signal", STATUS)
def test_a_signal_that_a_module_hides_is_told_all_the_same(signal):
    result = stopped(signal, "reknow.patching.patches", "show", "nowhere.patch", hidden=True)
    assert result.returncode == STATUS[signal] and result.stderr.startswith("stopped: "), result.stderr


def test_a_program_that_is_told_to_ignore_sigterm_does():
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from reknow.__main__ import main\n"
        "os.kill(os.getpid(), signal.SIGTERM); main()"
    )
    result = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("reknow ")


def test_a_command_takes_leave_of_the_processes_that_share_its_work(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    assert exit_status(lambda: 3, debug=False) == 3
    assert not torch.distributed.is_initialized()
    assert exit_status(lambda: 0, debug=False) == 0
