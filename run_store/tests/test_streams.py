"""Standard output that is closed, full, a closed pipe or ASCII alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from run_store import Run
from run_store.tests.executors.test_faults import environment

PRINT = """
import sys
from rich.console import Console
from run_store.command_line import run_command
def show(argv):
    for _ in range(10_000): Console().print("word " * 20)
sys.exit(run_command(show))
"""


def shell(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script in which $PYTHON and $PRINT stand for a command."""
    return subprocess.run(
        ["bash", "-c", script],
        env=environment() | {"PYTHON": sys.executable, "PRINT": PRINT} | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("where", "code", "error"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("| true", 141, ""),
        (">/dev/full", 2, "error: 'standard output': No space left on device\n"),
    ],
)
def test_where_nothing_can_be_written(where: str, code: int, error: str) -> None:
    ended = shell(f'"$PYTHON" -c "$PRINT" {where}; exit "${{PIPESTATUS[0]}}"')
    assert (ended.returncode, ended.stderr) == (code, error)


def test_a_narrow_terminal_that_has_ascii_alone(tmp_path: Path) -> None:
    study = tmp_path / "st\udcffudy"  # a name that is no text
    Run.create(study, {}, label="a label of many words", steps=9)
    ended = shell(
        'cd "$STUDY"; LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 COLUMNS=40 '
        '"$PYTHON" -m llm_experiments status .; '
        'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$PYTHON" -c '
        "'from run_store.command_line import run_command; import os; "
        'run_command(lambda argv: print(os.environ["STUDY"]))\' | grep -c "$STUDY"',
        STUDY=str(study),
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "1 runs: 1 waiting" in ended.stdout
    assert ended.stdout.endswith("\n1\n")


def test_a_symbolic_link_that_loops_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    script = (
        "import sys, pathlib; from run_store import Run; "
        "from run_store.command_line import run_command; "
        "sys.exit(run_command(lambda argv: Run.create(pathlib.Path(argv[0]) / 's', {})))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "loop"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert str(tmp_path / "loop") in ended.stderr
    assert ended.stderr.count("\n") == 1
