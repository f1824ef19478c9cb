"""Ctrl-C is one line, whatever the process is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from run_store.tests.executors.test_faults import ROOT, environment

# Minutes of work outside of Python, which would hear of a signal only afterwards.
BUSY = """
import hashlib, sys
from run_store.command_line import run_command
from run_store.signals import interruptible
def work(argv):
    print("at work", flush=True)
    interruptible(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1))
sys.exit(run_command(work))
"""
SLOW = "import time; print('importing', flush=True); time.sleep(1000)"


def interrupted(command: list[str], path: Path | None = None) -> tuple[int, str]:
    """How a command ends, and what it says, that is interrupted once it has written a line."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment() | ({} if path is None else {"PYTHONPATH": str(path)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("room", ["llm_experiments", "vision_appendix", "ufm", "reports"])
def test_an_interrupt_while_modules_are_imported(room: str, tmp_path: Path) -> None:
    (tmp_path / "xarray.py").write_text(SLOW)  # in place of the one that all rooms import
    assert interrupted(["-m", room], tmp_path) == (130, "interrupted\n")


def test_an_interrupt_of_a_call_outside_of_python() -> None:
    assert interrupted(["-c", BUSY]) == (130, "interrupted\n")


def test_importing_a_room_leaves_the_handler_of_others_alone() -> None:
    script = (
        "import signal\n"
        "import run_store, ufm\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())
