"""How every run of a study stands, from its files alone, while others write them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from run_store.command_line import one_line, printable
from run_store.leases import Watch, holder, newest_attempt, read_lease
from run_store.runs import Run, run_folders
from run_store.signals import terminated_by_signal

_POLL_SECONDS = 0.5
_LONGEST_WAIT = 1e9
# In the order in which a reader wants them.
STATES = ("running", "lost", "failed", "unreadable", "diverged", "waiting", "finished")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How one run stands."""

    run: Run
    label: str
    status: str
    """one of STATES: waiting has not begun, or stopped with a checkpoint; lost has a process that
    died without a word, or fell silent; silent (a lease of another machine) is not settled yet"""
    step: int
    steps: int
    seconds_left: float = math.nan
    note: str = ""
    """who has it, or what went wrong"""


def study_states(folder: Path, watch: Watch) -> list[RunState]:
    """Every run of a study. ValueError if the folder is missing; nothing else stops it."""
    return [_state(Run(path), watch) for path in run_folders(folder)]


def settled_states(folder: Path) -> list[RunState]:
    """As `study_states`, having waited until every silent lease is known to live or to be dead."""
    watch, told = Watch(), False
    while True:
        states = study_states(folder, watch)
        silent = sum(state.status == "silent" for state in states)
        if not silent:
            return states
        if not told:
            print(f"watching {silent} runs of other machines for a sign of life", file=sys.stderr)
            told = True
        time.sleep(_POLL_SECONDS)


def unfinished_business(folder: Path) -> list[Run]:
    """The runs of a study that failed or were lost."""
    return [s.run for s in settled_states(folder) if s.status in ("failed", "lost")]


def show_status(folder: Path, *, follow: bool = False) -> int:
    """Print a table of a study's runs; with `follow`, keep it up to date until all have ended.

    Returns 0, or 1 if a run cannot be read.
    """
    console = Console(highlight=False)
    if not follow:
        states = settled_states(folder)
        console.print(_table(states))
        console.print(summary(states))
    else:
        watch = Watch()
        live = Live(console=console, refresh_per_second=4)
        with terminated_by_signal(), live:  # which gives the cursor back
            while True:
                states = study_states(folder, watch)
                table = _table(states)
                table.caption = summary(states)
                live.update(table)
                if not any(s.status in ("running", "silent", "waiting") for s in states):
                    break
                time.sleep(4 * _POLL_SECONDS)
    return 1 if any(state.status == "unreadable" for state in states) else 0


def summary(states: Sequence[RunState]) -> str:
    """How many runs stand how, in one line."""
    shown = [s if s.status in STATES else replace(s, status="running") for s in states]
    counts = [(sum(s.status == status for s in shown), status) for status in STATES]
    parts = [f"{count} {status}" for count, status in counts if count]
    return f"{len(states)} runs: {', '.join(parts)}" if parts else "no runs"


def _state(run: Run, watch: Watch, *, looked_twice: bool = False) -> RunState:
    try:
        manifest = run.manifest
        config = manifest["config"]
        steps = manifest.get("steps", config.get("steps"))
        steps = steps if isinstance(steps, int) else 0
        label = str(manifest.get("label") or _label(config))
    except (ValueError, OSError) as error:
        return RunState(
            run=run, label="", status="unreadable", step=0, steps=0, note=one_line(error)
        )
    state = RunState(run=run, label=label, status=manifest["status"], step=0, steps=steps)
    newest = newest_attempt(run.folder / "attempts")
    lease = {} if newest is None else read_lease(newest)
    if state.status == "finished":
        return replace(state, step=steps)
    if newest is None:  # a run of before there were attempts has died if it still runs
        status = {"new": "waiting", "running": "lost"}.get(state.status, state.status)
        return replace(state, status=status, note=str(manifest.get("error") or ""))
    state = replace(state, step=_number(lease.get("step")), note=manifest["error"] or "")
    if state.status != "running":
        return state
    held = watch.is_held(newest)
    if held is False:
        if not looked_twice:  # it may have ended between two of our reads
            return _state(run, watch, looked_twice=True)
        return replace(state, status="lost", note=f"{holder(lease)} is gone")
    pace = lease.get("steps_per_second")
    left = (steps - state.step) / pace if isinstance(pace, float) and pace > 0 else math.nan
    status = "silent" if held is None else "running"
    return replace(state, status=status, seconds_left=left, note=holder(lease))


def _table(states: Sequence[RunState]) -> Table:
    table = Table("run", "what", "status", box=None, pad_edge=False)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for state in states:
        left = state.seconds_left if state.seconds_left < _LONGEST_WAIT else math.nan
        table.add_row(
            state.run.id,
            Text(printable(state.label)),
            state.status,
            f"{state.step}/{state.steps or '?'}",
            "" if math.isnan(left) else str(timedelta(seconds=round(left))),
            Text(printable(state.note)),
        )
    return table


def _label(config: dict[str, Any]) -> str:
    named = ("model", "weight_decay", "seed")
    return ", ".join(f"{name} {config[name]}" for name in named if name in config)


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
