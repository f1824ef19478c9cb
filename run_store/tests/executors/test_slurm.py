"""Slurm through submitit, with commands of our own in place of Slurm's (slurm_standins.py)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from run_store.leases import attempt_folders
from run_store.runs import read_study
from run_store.tests.executors.slurm_standins import stand_in
from run_store.tests.executors.test_faults import ROOT, command, environment


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is missing")
def test_a_sweep_through_slurm_survives_a_node_that_fails(tmp_path: Path) -> None:
    added = stand_in(tmp_path) | {"PYTHONPATH": str(ROOT), "FAIL_FIRST": "1"}
    study = tmp_path / "s"
    result = subprocess.run(
        [*command(study), "--runs", "2", "--executor", "slurm"],
        env=environment() | added,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "'finished': 2" in result.stdout
    assert len((tmp_path / "jobs" / "list").read_text().splitlines()) == 3
    script = (tmp_path / "jobs" / "2.sh").read_text()
    assert "#SBATCH --time=1440" in script
    assert "#SBATCH --cpus-per-task=1" in script
    found = read_study(study)
    assert len(found.runs) == 2
    for run in found.runs:  # the first job of one of them never began
        assert len(attempt_folders(run.folder / "attempts")) == 1


def test_without_slurm_it_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [*command(tmp_path / "s"), "--executor", "slurm"],
        env=environment() | {"PATH": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: executor 'slurm' needs ")
