"""What a sweep shows while it goes: one bar for all, one for each run at work."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from run_store.executors.tasks import Outcome, Task


class SweepProgress:
    """Steps done, time left and speed; a plain line a run where there is no terminal.

    It is told nothing by the workers: what it shows are the leases of the runs at work.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._shown: dict[Task, TaskID] = {}
        self._went_on: set[Task] = set()
        self._total = self._done = self._steps_done = 0

    def say(self, line: str) -> None:
        """One line above the bars."""
        self._console.print(line, markup=False, soft_wrap=not self._console.is_terminal)

    def start(self, pending: list[Task], *, done: int) -> None:
        """Begin with the `pending` runs of a sweep, of which `done` more are done."""
        self._total, self._done = len(pending) + done, done
        if done:
            self.say(f"{done} of {self._total} runs are done already")
        if pending:
            self._bars.start()
            steps = sum(task.steps for task in pending)
            self._all = self._bars.add_task("all steps", total=steps, speed="")

    def show(self, leases: Mapping[Task, Mapping[str, Any]]) -> None:
        """Where the runs at work stand: what each one's lease says."""
        together, unit, steps = 0.0, "", self._steps_done
        for task, lease in leases.items():
            step, rate, unit = int(lease["step"]), float(lease["rate"]), str(lease["unit"])
            if task not in self._shown:
                self._shown[task] = self._bars.add_task(
                    task.label, total=task.steps, completed=step, speed=""
                )
            if lease["first_step"] and task not in self._went_on:
                self._went_on.add(task)
                self.say(f"{task.label} goes on from step {lease['first_step']}")
            speed = f"{rate:,.0f} {unit}" if rate else ""
            self._bars.update(self._shown[task], completed=step, speed=speed)
            together, steps = together + rate, steps + step
        if not self._bars.tasks:
            return
        for task in self._shown.keys() - leases.keys():
            self._bars.remove_task(self._shown.pop(task))
        speed = f"{together:,.0f} {unit}" if together else ""
        self._bars.update(self._all, completed=steps, speed=speed)

    def ended(self, task: Task, outcome: Outcome) -> None:
        """A run has ended, well or not."""
        self._done += 1
        self._steps_done += task.steps
        time = f", {outcome.seconds:,.1f} s" if outcome.seconds else ""
        reason = f": {outcome.error}" if outcome.error else ""
        self.say(f"[{self._done}/{self._total}] {task.label} {outcome.status}{time}{reason}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        with contextlib.suppress(OSError):  # a terminal that has gone
            for shown in self._shown.values():
                self._bars.remove_task(shown)
            for task in self._bars.tasks[:1]:  # of a run that was stopped, the steps stay
                self._bars.update(task.id, completed=max(task.completed, self._steps_done))
            self._bars.stop()
