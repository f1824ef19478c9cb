"""A sweep on a Ray cluster that loses a worker, a node and its driver, all by kill -9."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from run_store import read_study
from run_store.leases import attempt_folders
from run_store.tests.executors import ray_faults, toy_runs

ROOT = Path(__file__).parents[3]


def can_unshare() -> bool:
    """Whether this user may make a network namespace."""
    command = ["unshare", "--net", "true"]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(command, capture_output=True).returncode
    )


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.skipif(not can_unshare(), reason="no right to make a network namespace")
def test_a_sweep_on_ray_survives_the_death_of_worker_node_and_driver(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    toy_runs.sweep_here(tmp_path / "undisturbed", ray_faults.SWEEP)
    faults = [
        sys.executable,
        "-m",
        "run_store.tests.executors.ray_faults",
        str(tmp_path / "faults"),
    ]
    result = subprocess.run(
        ["unshare", "--net", *faults], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "killed a worker, a node and the driver" in result.stdout

    study = read_study(tmp_path / "faults")
    assert not study.unfinished
    assert not study.problems
    expected = {r.id: r.folder / "classes.nc" for r in read_study(tmp_path / "undisturbed").runs}
    assert {run.id for run in study.runs} == set(expected)
    attempts = 0
    for run in study.runs:
        assert (run.folder / "classes.nc").read_bytes() == expected[run.id].read_bytes()
        assert len((run.folder / "ends").read_text().splitlines()) == 1, "run to its end twice"
        attempts += len(attempt_folders(run.folder / "attempts"))
    # A worker may publish its run before it hears that the driver is dead.
    assert attempts >= len(study.runs) + 2, "a fault hit nothing"
