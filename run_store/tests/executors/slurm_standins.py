"""Commands in place of Slurm's: each job is a process of this machine, begun at once.

They do what submitit asks of sbatch, srun, sacct and scancel, and no more; there is no queue.
"""

from __future__ import annotations

import os
from pathlib import Path

_SBATCH = """#!/bin/sh
# A job's number is that of the lines in the list; with FAIL_FIRST the first job's node fails.
echo job >> "$JOBS/list"; id=$(wc -l < "$JOBS/list"); file=$(eval echo \\${$#})
cp "$file" "$JOBS/$id.sh"; echo RUNNING > "$JOBS/$id.state"
if [ "$id$FAIL_FIRST" = 11 ]; then echo NODE_FAIL > "$JOBS/$id.state"; else
  export SLURM_JOB_ID=$id SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
  export SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here
  (sh "$file"; echo COMPLETED > "$JOBS/$id.state") > "$JOBS/$id.out" 2>&1 &
fi
echo "Submitted batch job $id"
"""
_SRUN = """#!/bin/sh
# Everything before the Python of the job is an option of srun.
while [ "${1%python*}" = "$1" ]; do shift; done
exec "$@"
"""
_SACCT = """#!/bin/sh
echo "JobID|State|NodeList"
cd "$JOBS" && for file in *.state; do
  read state < "$file"; echo "${file%.state}|$state|here"
done
"""


def stand_in(folder: Path) -> dict[str, str]:
    """Put the commands into a folder; returns the environment in which they are found.

    What was submitted lies in <folder>/jobs: a line a job in `list`, its script in <number>.sh.
    """
    commands, jobs = folder / "bin", folder / "jobs"
    for made in (commands, jobs):
        made.mkdir()
    scripts = {"sbatch": _SBATCH, "srun": _SRUN, "sacct": _SACCT, "scancel": "#!/bin/sh\n"}
    for name, script in scripts.items():
        path = commands / name
        path.write_text(script)
        path.chmod(0o755)
    return {"PATH": f"{commands}:{os.environ['PATH']}", "JOBS": str(jobs)}
