"""Child processes of a report, called from a script as people write them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
os.cpu_count = lambda: 2
from reports.workers import parallel_map
print(*parallel_map(len, ["a", "bb"], worth=1))
print(*parallel_map(os.getenv, ["OMP_NUM_THREADS"], worth=1), os.getenv("OMP_NUM_THREADS"))
os.chdir("/")
print(*parallel_map(os.path.abspath, ["x"], worth=1))
"""


def test_a_script_needs_no_guard_and_keeps_its_threads(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "1 2\n1 7\n/x\n"), result.stderr
