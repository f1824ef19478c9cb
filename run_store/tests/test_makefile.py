"""`make` with an interpreter that will not do says so, and the next call begins anew."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from run_store.tests.executors.test_faults import ROOT

# As Debian's without python3-venv: it leaves an interpreter without pip behind.
WITHOUT_VENV = """#!/bin/sh
[ "$1" = -c ] && exit 0
mkdir -p "$3/bin"
touch "$3/bin/python"
exit 1
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def made(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    venv = folder / "venv"
    command = ["make", "--file", str(ROOT / "Makefile"), f"VENV={venv}", f"PYTHON={python}"]
    return subprocess.run([*command, f"{venv}/bin/python"], capture_output=True, text=True)


def test_an_interpreter_that_is_not_here(tmp_path: Path) -> None:
    ended = made(tmp_path, "python9")
    assert ended.returncode == 2
    assert "error: python9 is not here; name another" in ended.stdout + ended.stderr
    assert "older" not in ended.stdout + ended.stderr


def test_a_virtual_environment_that_failed_is_not_there(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text(WITHOUT_VENV)
    python.chmod(0o755)
    assert made(tmp_path, str(python)).returncode == 2
    assert not (tmp_path / "venv").exists()
