"""A sweep of runs that do not come to their first step, in a process that a test may end."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from run_store import Attempt, Run
from run_store.command_line import run_command
from run_store.executors import ExecutorConfig, SweepProgress, Task, open_pool, sweep


def compile_for_ever(attempt: Attempt, hears: bool) -> None:
    """As a compiler does that another process works for, and that may not come back to Python."""
    attempt.resume(0)
    if not hears:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    (attempt.run.folder / "compiling").touch()
    subprocess.run(["sleep", "1000"], check=True)


def main(argv: list[str]) -> None:
    """Sweep; a run that is at work is waited for as long as it takes."""
    study, hears = Path(argv[0]), argv[1] == "hears"
    run = Run.create(study, {}, label="stuck", steps=9)
    task = Task(folder=run.folder, work=compile_for_ever, argument=hears, steps=9, label="stuck")
    open_it = functools.partial(open_pool, ExecutorConfig(), device="cpu", threads=1)
    with mock.patch("run_store.executors.sweep.GRACE_SECONDS", 1e6):
        sweep([task], open_it, SweepProgress())


if __name__ == "__main__":
    # Under this module's name, by which workers find `compile_for_ever`; not as __main__.
    from run_store.tests.executors import stuck_runs

    sys.exit(run_command(stuck_runs.main))
