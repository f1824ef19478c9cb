"""Sweeps that are asked to end: one line, nothing left behind, no wait for what cannot be kept."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from run_store import Run, attempt, leases
from run_store.executors import Outcome, SweepProgress
from run_store.status import study_states
from run_store.tests.executors import toy_runs
from run_store.tests.executors.test_faults import environment


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGTERM, "stopped: the same command goes on from the checkpoints"),
        (signal.SIGHUP, "stopped: the same command goes on from the checkpoints"),
        (signal.SIGINT, "interrupted"),
    ],
)
@pytest.mark.parametrize("how", ["hears", "deaf"])
def test_a_run_before_its_first_step_ends_at_once_with_all_that_it_started(
    how: str, number: signal.Signals, said: str, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "run_store.tests.executors.stuck_runs", str(tmp_path), how],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("*/compiling")):
        assert process.poll() is None
    process.send_signal(number)
    # What the run has started holds our end of stderr, so this returns when it is gone.
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    lines = errors.splitlines()
    assert lines.count(said) == 1
    assert [line for line in lines if "Error" in line or "Traceback" in line] == []
    (state,) = study_states(tmp_path, leases.Watch())
    assert state.status == "waiting" or how == "deaf"


def test_progress_that_is_piped_is_whole_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    SweepProgress().say("word " * 30)
    assert capsys.readouterr().err.count("\n") == 1


def test_progress_says_once_where_a_run_goes_on_and_keeps_its_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (task,) = toy_runs.tasks(tmp_path, 1, steps=100, size=5, checkpoint_every=100)
    progress = SweepProgress()
    progress.start([task], done=0)
    lease: dict[str, Any] = {"step": 0, "first_step": 0, "rate": 0.0, "unit": "steps/s"}
    for step, first in ((0, 0), (40, 40), (60, 40)):  # the first look comes before the checkpoint
        progress.show({task: lease | {"step": step, "first_step": first}})
    progress.close()
    assert capsys.readouterr().err.count("seed 0 goes on from step 40\n") == 1
    assert progress._bars.tasks[0].completed == 60
    progress.ended(task, Outcome(status="finished"))


def test_status_that_follows_gives_the_cursor_back(tmp_path: Path) -> None:
    toy_runs.tasks(tmp_path, 1, steps=100, size=5, checkpoint_every=100)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_experiments", "status", "--follow", str(tmp_path)],
        env=environment() | {"TERM": "xterm"},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while b"seed 0" not in shown:
        shown += os.read(ours, 1000)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    while True:
        try:
            shown += os.read(ours, 1000)
        except OSError:  # the other end is closed
            break
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


FAKE_RAY = """
import ctypes, os, signal, sys, types
from run_store.executors.pools import ExecutorConfig
from run_store.executors.ray import RayPool
from run_store.signals import Terminated, terminated_by_signal

def init(**options):
    ctypes.CDLL(None).signal(int(signal.SIGTERM), None)  # SIG_DFL, behind Python's back

fake = types.SimpleNamespace(init=init, cluster_resources=dict, remote=lambda **o: lambda f: f)
sys.modules["ray"] = fake
try:
    with terminated_by_signal():
        RayPool(1, ExecutorConfig(executor="ray"), device="cpu", threads=1)
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
except Terminated as asked:
    sys.exit(asked.exit_code)
"""


def test_ray_does_not_take_the_signal_away() -> None:
    ended = subprocess.run([sys.executable, "-c", FAKE_RAY], env=environment())
    assert ended.returncode == 143


def test_an_attempt_says_whether_it_came_further(tmp_path: Path) -> None:
    with attempt(Run.create(tmp_path, {})) as mine:
        mine.resume(4)
        assert not mine.lease.has_advanced
        mine.advance(5)
        assert mine.lease.has_advanced
