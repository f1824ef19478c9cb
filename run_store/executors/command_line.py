"""The commands that every room's sweeps have alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from run_store.command_line import parse_options
from run_store.executors.pools import ExecutorConfig
from run_store.status import show_status


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Where the runs of a study lie, and where they are done."""

    study: str = "single"
    """name of the study's folder"""
    runs_dir: Path = Path("runs")
    """folder of all studies"""
    device: str = "auto"
    """auto, cpu or cuda"""
    execution: OmitArgPrefixes[ExecutorConfig] = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        if not self.study or Path(self.study).name != self.study or self.study.startswith("."):
            raise ValueError(f"study {self.study!r} is not a plain folder name")

    @property
    def study_folder(self) -> Path:
        """Where the runs live."""
        return self.runs_dir / self.study


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


def retry_command(program: str, argv: list[str], retry: Callable[..., dict[str, int]]) -> int:
    """`retry STUDY`, by a room's own function of study, execution and device."""
    options = parse_options(Retry, argv, prog=f"{program} retry")
    return print_counts(options.study, retry(options.study, options.execution, options.device))


def print_counts(study: Path, counts: Mapping[str, int]) -> int:
    """How many runs of a sweep ended in each status; exit code 1 if one failed or was lost."""
    done = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    print(f"{study}: {done or 'nothing to do'}")
    return 1 if counts.get("failed") or counts.get("lost") else 0
