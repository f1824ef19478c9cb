"""The README's commands are commands: what is cheap is run, of the rest the options are read."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from llm_experiments.__main__ import Prepare, main
from llm_experiments.audit.command import Audit
from run_store.command_line import parse_options

README = Path(__file__).parents[2] / "README.md"
PREFIX = ".venv/bin/python -m llm_experiments "
COMMANDS = [
    line.removeprefix(PREFIX).split(" #")[0].strip()
    for line in README.read_text(encoding="utf-8").splitlines()
    if line.startswith(PREFIX)
]


def test_there_is_one_of_each() -> None:
    assert {command.split()[0] for command in COMMANDS} >= {
        *("prepare", "train", "sweep", "status", "plan", "audit", "predict-decay", "downstream")
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = shlex.split(command)
    if name in ("prepare", "audit"):
        parse_options({"prepare": Prepare, "audit": Audit}[name], options, prog=name)
    elif name in ("status", "retry", "predict-decay", "downstream"):
        assert main([name, *options]) == 2  # no such study here
    else:
        asked: list[object] = []
        monkeypatch.setattr("llm_experiments.sweep.sweep", lambda *grids: asked.extend(grids) or {})
        assert main([name, *options]) == 0
        assert bool(asked) == (name != "plan")
