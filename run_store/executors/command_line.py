"""The commands that every room's sweeps have alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from run_store.command_line import parse_options
from run_store.executors.pools import ExecutorConfig
from run_store.status import show_status


@dataclass(frozen=True, kw_only=True)
class Status:
    """Show every run of a study."""

    study: Positional[Path]
    """folder runs/<study>"""
    follow: bool = False
    """keep the table up to date until no run is left to do"""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Do the failed and lost runs of a study again."""

    study: Positional[Path]
    """folder runs/<study>"""
    device: str = "auto"
    """auto, cpu or cuda"""
    execution: OmitArgPrefixes[ExecutorConfig] = field(default_factory=ExecutorConfig)


def status_command(program: str, argv: list[str]) -> int:
    """`status STUDY`: exit code 1 if a run cannot be read."""
    options = parse_options(Status, argv, prog=f"{program} status")
    return show_status(options.study, follow=options.follow)


def print_counts(study: Path, counts: Mapping[str, int]) -> int:
    """How many runs of a sweep ended in each status; exit code 1 if one failed or was lost."""
    done = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    print(f"{study}: {done or 'nothing to do'}")
    return 1 if counts.get("failed") or counts.get("lost") else 0
