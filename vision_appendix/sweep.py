"""A grid of runs, one after another: finished ones are skipped, interrupted ones go on."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from frequency_bins import (
    ClassMetrics,
    Diverged,
    Run,
    RunInUse,
    attempt,
    resolve_device,
    run_id,
)
from vision_appendix.augmentation import check_size
from vision_appendix.configs import RunConfig, SweepConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages, load_images, resolve_counts
from vision_appendix.training import (
    build,
    evaluation_steps,
    synchronise,
    train,
    training_step,
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run of the grid: its config, and its images of each class."""

    config: RunConfig
    class_counts: tuple[int, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps from its beginning to its end."""
        return evaluation_steps(self.config, sum(self.class_counts))[-1]

    def describe(self) -> str:
        """The run in a few words: what a sweep may vary."""
        config = self.config
        parts = [config.imbalance, f"weight decay {config.weight_decay:g}", f"seed {config.seed}"]
        return ", ".join(parts + ([] if config.decay == "all" else [f"decay {config.decay}"]))


def sweep(config: SweepConfig) -> dict[str, int]:
    """Run what is missing of a grid; returns how many runs ended in each status.

    Runs that are finished or known to diverge are skipped. Every run has a lock, so two sweeps
    started at once do no run twice.

    Raises:
        ValueError, OSError: what the user has to mend; runs interrupted by it can go on later.
    """
    device = resolve_device(config.device)
    data = load_images(config.data).to(device)
    runs = [(cell, create_run(config, cell, data)) for cell in resolve_cells(config, data)]
    counts: dict[str, int] = {}
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
    )
    with bars:
        steps = sum(cell.steps for cell, run in runs if not run.is_done())
        everything = bars.add_task("all steps", total=steps, speed="")
        for number, (cell, run) in enumerate(runs, start=1):
            status = "finished earlier" if run.is_done() else _attempt(cell, run, data, bars)
            counts[status] = counts.get(status, 0) + 1
            if status != "finished earlier":
                bars.advance(everything, cell.steps)
                line = f"[{number}/{len(runs)}] {cell.describe()} {status}"
                bars.console.print(line, markup=False)
    return counts


def plan(config: SweepConfig, *, steps: int = 3) -> list[tuple[Cell, float | None]]:
    """Every run of the grid with the seconds it takes yet: None where it is done.

    A step is timed on the device, as the mean of `steps` after one that is not counted; the
    passes over the test images are left out. Nothing is written.
    """
    device = resolve_device(config.device)
    data = load_images(config.data).to(device)
    seconds = 0.0
    planned: list[tuple[Cell, float | None]] = []
    for cell in resolve_cells(config, data):
        folder = config.runs_dir / config.study / run_id(_resolved(config, cell, data))
        if folder.is_dir() and Run(folder).is_done():
            planned.append((cell, None))
            continue
        seconds = seconds or _seconds_per_step(cell, data, steps)  # alike in every run of a grid
        planned.append((cell, seconds * cell.steps))
    return planned


def resolve_cells(config: SweepConfig, data: LabelledImages) -> list[Cell]:
    """The grid's runs with their class counts; ValueError if one cannot be had from the data."""
    check_size(config.training, data.images.shape[1])
    return [Cell(config=cell, class_counts=resolve_counts(cell, data)) for cell in config.cells()]


def create_run(config: SweepConfig, cell: Cell, data: LabelledImages) -> Run:
    """The folder of a run; one that is there already is kept."""
    return Run.create(config.runs_dir / config.study, _resolved(config, cell, data))


def _attempt(cell: Cell, run: Run, data: LabelledImages, bars: Progress) -> str:
    bar = bars.add_task(cell.describe(), total=cell.steps, speed="")
    subset = data.subset(cell.class_counts, cell.config.seed)
    try:
        with attempt(run) as mine:
            if run.is_done():  # by another sweep, meanwhile
                return "finished earlier"
            if run.status == "finished":
                mine.withdraw()
            mine.update(**_circumstances(cell.config, subset))
            train(
                cell.config,
                subset,
                mine,
                report=lambda at: bars.update(
                    bar, completed=at.step, speed=f"{at.images_per_second:,.0f} images/s"
                ),
            )
        return "finished"
    except RunInUse:
        return "in use"
    except Diverged:
        return "diverged"
    finally:
        bars.remove_task(bar)


def _seconds_per_step(cell: Cell, data: LabelledImages, steps: int) -> float:
    torch.set_num_threads(cell.config.threads)
    subset = data.subset(cell.class_counts, cell.config.seed)
    model, optimizer = build(cell.config, subset)
    metrics = ClassMetrics(len(data.class_names), data.images.device)
    begin = 0.0
    for step in range(steps + 1):
        if step == 1:
            synchronise(data.images.device)
            begin = time.perf_counter()
        training_step(cell.config, subset, model, optimizer, metrics, step)
    synchronise(data.images.device)
    return (time.perf_counter() - begin) / steps


def _resolved(config: SweepConfig, cell: Cell, data: LabelledImages) -> dict[str, Any]:
    return cell.config.resolved(config.data, cell.class_counts, data.data_hash)


def _circumstances(config: RunConfig, data: LabelledImages) -> dict[str, Any]:
    """What the manifest tells of how a run was done, beside its config."""
    device = data.images.device
    model, _ = build(config, data)
    packages = ("torch", "torchvision", "numpy", "xarray", "h5netcdf")
    return {
        "versions": {
            "python": sys.version.split()[0],
            **{package: version(package) for package in packages},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "git_commit": _git_commit(),
        "data_hash": data.data_hash,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _git_commit() -> str | None:
    command = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
