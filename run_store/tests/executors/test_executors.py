"""What executors hand to a run (GPUs, signals to stop), and what `status` shows of it meanwhile."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from run_store import Attempt, Run, Stopped, attempt, leases, status
from run_store.attempts import TERMINATED
from run_store.executors import ExecutorConfig, Task, do, open_pool
from run_store.executors.local import LocalPool
from run_store.tests.executors import toy_runs
from run_store.tests.executors.test_faults import environment


def end_by_signal(mine: Attempt, number: signal.Signals) -> None:
    """A run whose batch system ends it: it stops at the next step."""
    mine.advance(1)
    assert not mine.should_stop()
    os.kill(os.getpid(), number)
    if mine.should_stop():
        raise Stopped("at step 1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_of_a_batch_system_stops_a_run(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        run = Run.create(tmp_path, {"seed": 0})
        task = Task(folder=run.folder, work=end_by_signal, argument=number, steps=9, label="")
        assert do(task).status == "waiting"
        assert run.status == "waiting"
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
        TERMINATED.clear()  # as the next call of `do` would


def test_children_share_the_gpus_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3,5,1,0")
    config = ExecutorConfig(gpus_per_run=2)
    with contextlib.closing(open_pool(config, 9, device="cuda", threads=1)) as pool:
        assert isinstance(pool, LocalPool)
        assert pool.width == 2
        assert pool._gpu_sets == ["7,3", "5,1"]
    with pytest.raises(ValueError, match="gpus_per_run is 6; this machine has 5"):
        open_pool(ExecutorConfig(gpus_per_run=6), 9, device="cuda", threads=1)


def test_a_child_sees_its_gpus_alone() -> None:
    with contextlib.closing(LocalPool(1, ["3,4"])) as pool:
        assert pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "3,4"


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_of_a_run_wait_without_spinning(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user says otherwise."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # and back again
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    with contextlib.closing(open_pool(ExecutorConfig(), 1, device="cpu", threads=1)) as pool:
        assert pool.submit(os.getenv, "OMP_WAIT_POLICY").result() == (given or "passive")


def leave_behind(path: Path) -> None:
    """As libraries do that have something to clean up."""
    atexit.register(path.write_text, "cleaned up")


def test_a_child_cleans_up_before_it_ends(tmp_path: Path) -> None:
    with contextlib.closing(LocalPool(1)) as pool:
        pool.submit(leave_behind, tmp_path / "left").result()
        (child,) = pool._children.values()
    assert (tmp_path / "left").read_text() == "cleaned up"
    assert child.process.exitcode == 0


def test_status_follows_a_run_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.01)
    (task,) = toy_runs.tasks(tmp_path, 1, steps=100, size=5, checkpoint_every=100)
    with contextlib.ExitStack() as running:
        mine = running.enter_context(attempt(Run(task.folder)))
        mine.resume(20)
        mine.advance(60, 4.0, "steps/s")
        while leases.read_lease(mine.folder)["beat"] < 2:
            pass
        (state,) = status.study_states(tmp_path, leases.Watch())
        assert state.status == "running"
        # 40 steps are left, at the pace of the 40 that this attempt did.
        assert 0 < state.seconds_left < 1e9
        assert (state.step, state.steps) == (60, 100)
        assert state.note == f"process {os.getpid()} on {os.uname().nodename}"
        looks = 0

        def sleep(seconds: float) -> None:
            nonlocal looks
            looks += 1
            if looks == 2:
                toy_runs.walk(mine, task.argument)
                running.close()

        monkeypatch.setattr(status, "time", SimpleNamespace(sleep=sleep))
        assert status.show_status(tmp_path, follow=True) == 0
    assert looks == 2
    shown = capsys.readouterr().out
    assert "1 runs: 1 finished" in shown
    assert "100/100" in shown


def test_handing_out_runs_needs_no_torch() -> None:
    """Whose import is most of what a process of a sweep costs."""
    script = (
        "import sys, run_store.status\n"
        "from run_store.executors import ExecutorConfig, open_pool\n"
        "open_pool(ExecutorConfig(), 2, device='cpu', threads=1).close()\n"
        "from run_store import *\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())
