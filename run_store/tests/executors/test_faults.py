"""Sweeps that are stopped, starved and doubled, and publications that are cut short: for real."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from run_store import LeaseLost, Run, RunInUse, attempts, leases, read_study
from run_store.attempts import Attempt, attempt
from run_store.status import settled_states, study_states
from run_store.tests.executors import toy_runs
from run_store.tests.executors.ray_faults import at_work, steps_done
from run_store.tests.executors.test_ray import ROOT

SWEEP = ("--runs", "4", "--steps", "300", "--size", "160", "--checkpoint-every", "10")
SMALL = toy_runs.Walk(seed=0, steps=3, size=5, checkpoint_every=1)
OTHER = toy_runs.Walk(seed=7, steps=3, size=5, checkpoint_every=1)


def command(study: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "run_store.tests.executors.toy_runs", str(study), *SWEEP, *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}


def started(study: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(study, *more),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(study: Path) -> None:
    """Do what is left of a sweep in this process, which has imported everything already."""
    toy_runs.sweep_here(study, SWEEP)


def records(study: Path) -> dict[str, bytes]:
    found = read_study(study)
    assert not found.unfinished
    assert not found.problems
    return {run.id: (run.folder / "classes.nc").read_bytes() for run in found.runs}


def assert_each_ran_to_its_end_once(study: Path) -> None:
    for run in read_study(study).runs:
        assert len((run.folder / "ends").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    study = tmp_path_factory.mktemp("undisturbed") / "s"
    finish(study)
    return records(study)


def wait_for_work(process: subprocess.Popen[str], study: Path) -> None:
    """Until a run is at work that has a checkpoint."""
    while not (steps_done(study) and at_work(study)):
        try:
            process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"the sweep ended too early: {process.communicate()}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_checkpoints_and_the_sweep_goes_on(
    number: signal.Signals, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    study = tmp_path / "s"
    process = started(study)
    wait_for_work(process, study)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    assert "stopped: the same command goes on from the checkpoints" in errors
    states = settled_states(study)
    assert {state.status for state in states} <= {"waiting", "finished"}
    stopped = [state for state in states if state.status == "waiting" and state.step]
    assert stopped
    for state in stopped:  # stopped with a checkpoint of the very step it had come to
        newest = leases.newest_attempt(state.run.folder / "attempts")
        assert newest is not None
        assert (newest / f"checkpoint-{state.step}.npy").exists()
    finish(study)
    assert records(study) == undisturbed
    assert_each_ran_to_its_end_once(study)


def test_a_worker_that_is_killed_costs_one_attempt(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    study = tmp_path / "s"
    process = started(study)
    wait_for_work(process, study)
    os.kill(at_work(study)[0]["pid"], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert records(study) == undisturbed
    assert_each_ran_to_its_end_once(study)


def test_two_sweeps_at_once_do_no_run_twice(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    study = tmp_path / "s"
    both = [started(study, "--runs-in-parallel", "1") for _ in range(2)]
    ends = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert records(study) == undisturbed
    assert_each_ran_to_its_end_once(study)


def test_a_run_whose_process_died_is_lost_and_done_again(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    study = tmp_path / "s"
    process = started(study, "--runs-in-parallel", "1")
    wait_for_work(process, study)
    states = study_states(study, leases.Watch())
    assert "running" in {state.status for state in states}
    pid = at_work(study)[0]["pid"]
    process.kill()
    process.communicate()  # its child, which holds our end of stderr, dies with it
    lost = [state for state in settled_states(study) if state.status == "lost"]
    assert [state.note for state in lost] == [f"process {pid} on {os.uname().nodename} is gone"]
    finish(study)
    assert records(study) == undisturbed


def in_private_mount(script: str, study: Path) -> subprocess.CompletedProcess[str]:
    """A shell script that may mount a file system on the parent of `study`, which only it sees."""
    study.parent.mkdir()
    sweep = " ".join(command(study))
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env=environment() | {"MOUNTED": str(study.parent), "SWEEP": sweep, "STUDY": str(study)},
        capture_output=True,
        text=True,
    )


def can_mount() -> bool:
    script = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(script, capture_output=True).returncode
    )


@pytest.mark.skipif(not can_mount(), reason="no right to mount a small file system")
def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    script = """
    mount -t tmpfs -o size=160k none "$MOUNTED"
    $SWEEP; echo "exit code $?"
    find "$MOUNTED" -name '*.partial'
    cp -r "$STUDY" "$MOUNTED.copy"
    """
    result = in_private_mount(script, tmp_path / "disk" / "s")
    assert "exit code 2\n" in result.stdout
    assert ".partial" not in result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert "Traceback" not in result.stderr
    finish(tmp_path / "disk.copy")
    assert records(tmp_path / "disk.copy") == undisturbed


@pytest.mark.skipif(not can_mount(), reason="no right to mount a small file system")
def test_a_read_only_store_can_be_read_and_says_so(tmp_path: Path) -> None:
    finish(tmp_path / "disk.whole")
    script = f"""
    mount -t tmpfs none "$MOUNTED"
    cp -r "$MOUNTED.whole" "$STUDY"
    mount -o remount,ro "$MOUNTED"
    $SWEEP; echo "again: exit code $?"
    {sys.executable} -m llm_experiments status "$STUDY"
    $SWEEP --runs 5; echo "more: exit code $?"
    """
    result = in_private_mount(script, tmp_path / "disk" / "s")
    assert "again: exit code 0" in result.stdout
    assert "4 runs: 4 finished" in result.stdout
    assert "more: exit code 2" in result.stdout
    assert "Read-only file system" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_manifest_half_written_is_made_again(tmp_path: Path) -> None:
    (task,) = toy_runs.tasks(tmp_path, 1, steps=3, size=5, checkpoint_every=1)
    path = task.folder / "manifest.json"
    whole = path.read_bytes()
    for length in range(0, len(whole) - 2, 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"manifest\.json"):
            Run(task.folder).manifest  # noqa: B018
        (state,) = study_states(tmp_path, leases.Watch())
        assert state.status == "unreadable"
        toy_runs.tasks(tmp_path, 1, steps=3, size=5, checkpoint_every=1)
        assert path.read_bytes() == whole


def new_run(tmp_path: Path) -> Run:
    (task,) = toy_runs.tasks(tmp_path, 1, steps=3, size=5, checkpoint_every=1)
    return Run(task.folder)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lease seems to be of another machine, whose processes nobody here can see."""
    monkeypatch.setattr(leases, "is_held", lambda folder: None)


@pytest.mark.usefixtures("elsewhere")
def test_an_orphan_that_comes_back_cannot_overwrite_the_winner(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with contextlib.ExitStack() as stack:
        orphan = stack.enter_context(attempt(run))
        with pytest.raises(RunInUse):
            stack.enter_context(attempt(run))
        with attempt(run, dead=1) as mine:
            toy_runs.walk(mine, SMALL)
        winner = (run.folder / "classes.nc").read_bytes()
        with pytest.raises(LeaseLost):
            toy_runs.walk(orphan, OTHER)
    assert (run.folder / "classes.nc").read_bytes() == winner
    assert run.manifest["attempt"] == 2
    run.classes()


@pytest.mark.usefixtures("elsewhere")
def test_of_two_that_publish_at_once_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orphan has seen that the lease is its own, and only then is it taken over."""
    run = new_run(tmp_path)
    win = Attempt._win

    def overtaken(orphan: Attempt) -> None:
        monkeypatch.setattr(Attempt, "_win", win)
        with attempt(run, dead=1) as mine:
            toy_runs.walk(mine, SMALL)
        win(orphan)

    monkeypatch.setattr(Attempt, "_win", overtaken)
    with attempt(run) as orphan, pytest.raises(LeaseLost, match="published by another"):
        toy_runs.walk(orphan, OTHER)
    assert run.manifest["attempt"] == 2
    run.classes()


class Crash(BaseException):
    """The end of the process, as far as the store can tell."""


def crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end before the call number `call` that changes a name or removes a file."""
    calls = 0

    def counted(real: Any) -> Any:
        def maybe(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Crash
            return real(*arguments, **options)

        return maybe

    for name in ("rename", "replace", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def test_a_crash_between_any_two_steps_of_a_run_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = new_run(tmp_path / "whole")
    with attempt(whole) as mine:
        toy_runs.walk(mine, SMALL)
    call, crashes, redone = 0, True, 0
    while crashes:
        call += 1
        run = new_run(tmp_path / str(call))
        with monkeypatch.context() as patched:
            crash_at(call, patched)
            try:
                with attempt(run) as first:
                    toy_runs.walk(first, SMALL)
                crashes = False
            except Crash:
                pass
        with attempt(run) as second:
            if not run.is_done():
                redone += 1
                toy_runs.walk(second, SMALL)
        assert run.status == "finished"
        for name in ("classes.nc", "scalars.jsonl"):
            assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
        left = {path.name for path in run.folder.glob("attempts/0*/*") if path.name != "winner"}
        assert left <= {"lease.json", "manifest.json"}
    assert 5 < redone < call - 3  # crashes before and after the decision
    assert not attempts.TERMINATED.is_set()
