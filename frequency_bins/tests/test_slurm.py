"""Slurm through submitit, with commands of our own in place of Slurm's: each job is a process.

They do what submitit asks of sbatch, srun, sacct and scancel, and no more; no real queue.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from frequency_bins.leases import attempt_folders
from frequency_bins.runs import read_study
from frequency_bins.tests.test_faults import ROOT, command, environment

SBATCH = """#!/bin/sh
# A job's number is that of the lines in the list; the first job's node fails at once.
echo job >> "$JOBS/list"; id=$(wc -l < "$JOBS/list"); file=$(eval echo \\${$#})
cp "$file" "$JOBS/$id.sh"; echo RUNNING > "$JOBS/$id.state"
if [ "$id" = 1 ]; then echo NODE_FAIL > "$JOBS/$id.state"; else
  export SLURM_JOB_ID=$id SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
  export SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here
  (sh "$file"; echo COMPLETED > "$JOBS/$id.state") > "$JOBS/$id.out" 2>&1 &
fi
echo "Submitted batch job $id"
"""
SRUN = """#!/bin/sh
# Everything before the Python of the job is an option of srun.
while [ "${1%python*}" = "$1" ]; do shift; done
exec "$@"
"""
SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
for state in "$JOBS"/*.state; do
  id=$(basename "$state" .state); echo "$id|$(cat "$state")|here"
done
"""


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is missing")
def test_a_sweep_through_slurm_survives_a_node_that_fails(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": ""}.items():
        path = tmp_path / "bin" / name
        path.write_text(script or "#!/bin/sh\n")
        path.chmod(0o755)
    (tmp_path / "jobs").mkdir()
    added = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "JOBS": str(tmp_path / "jobs"),
        "PYTHONPATH": str(ROOT),
    }
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
