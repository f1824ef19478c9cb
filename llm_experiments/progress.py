"""What a sweep shows while it goes: one bar for all, one for each run at work."""

from __future__ import annotations

from collections.abc import Sequence

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

from llm_experiments.configs import RunConfig
from llm_experiments.training import Progress as RunProgress


class SweepProgress:
    """Steps done, time left, and tokens a second; a plain line a run where there is no terminal."""

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
        self._tasks: dict[str, TaskID] = {}
        self._speeds: dict[str, float] = {}
        self._total = self._done = 0

    def say(self, line: str) -> None:
        """One line above the bars."""
        self._console.print(line, markup=False)

    def start(self, pending: Sequence[RunConfig], *, done: int) -> None:
        """Begin with the ``pending`` runs of a sweep, of which ``done`` more are finished."""
        self._total, self._done = len(pending) + done, done
        if done:
            self.say(f"{done} of {self._total} runs are done already")
        if pending:
            self._bars.start()
            steps = sum(config.steps for config in pending)
            self._all = self._bars.add_task("all steps", total=steps, speed="")

    def advanced(self, run_id: str, config: RunConfig, progress: RunProgress) -> None:
        """A run has made a step."""
        if run_id not in self._tasks:
            self._tasks[run_id] = self._bars.add_task(
                describe(config), total=config.steps, completed=progress.step - 1, speed=""
            )
            if progress.step > 1:
                self.say(f"{describe(config)} goes on from step {progress.step - 1}")
                self._bars.advance(self._all, progress.step - 1)
        self._speeds[run_id] = progress.tokens_per_second
        speed = f"{progress.tokens_per_second:,.0f} tokens/s"
        self._bars.update(self._tasks[run_id], completed=progress.step, speed=speed)
        together = f"{sum(self._speeds.values()):,.0f} tokens/s"
        self._bars.update(self._all, advance=1, speed=together)

    def ended(self, config: RunConfig, run_id: str, status: str, error: str) -> None:
        """A run has ended, well or not."""
        self._done += 1
        speed = self._speeds.pop(run_id, None)
        rate = f", {speed:,.0f} tokens/s" if speed else ""
        reason = f": {error}" if error else ""
        self.say(f"[{self._done}/{self._total}] {describe(config)} {status}{rate}{reason}")
        if run_id in self._tasks:
            self._bars.remove_task(self._tasks.pop(run_id))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bars.stop()


def describe(config: RunConfig) -> str:
    """A run in a few words: what a sweep may vary."""
    parts = [config.model, f"weight decay {config.weight_decay:g}", f"seed {config.seed}"]
    if config.loss_weight_exponent:
        parts.append(f"loss weight exponent {config.loss_weight_exponent:g}")
    if config.decay != "all":
        parts.append(f"decay {config.decay}")
    return ", ".join(parts)
