"""A grid of runs: what an executor has to do for each, and how to do the failed ones again."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frequency_bins import ClassMetrics
from run_store import Attempt, Run, resolve_device, run_id
from run_store.circumstances import absolute, circumstances, command_line, of_manifest, places
from run_store.executors import ExecutorConfig, Task, sweep_by
from run_store.status import unfinished_business
from vision_appendix.augmentation import check_size
from vision_appendix.configs import DataConfig, RunConfig, SweepConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages, load_images, resolve_counts
from vision_appendix.training import (
    Progress,
    build,
    evaluation_steps,
    synchronise,
    train,
    training_step,
)

_PACKAGES = ("torch", "torchvision", "numpy", "xarray", "h5netcdf")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a worker needs to know of one run, beside its folder."""

    config: RunConfig
    class_counts: tuple[int, ...]
    data: DataConfig
    device: str
    command: str


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

    Raises:
        ValueError, OSError: what the user has to mend; see `run_store.executors.sweep`.
    """
    if config.execution.executor == "local":
        resolve_device(config.device)
    data = load_images(config.data)
    tasks = [create_task(config, cell, data) for cell in resolve_cells(config, data)]
    return sweep_by(config.execution, tasks, device=config.device, threads=config.training.threads)


def retry(study: Path, execution: ExecutorConfig, device: str = "auto") -> dict[str, int]:
    """Run the failed and lost runs of a study again, from what their manifests hold.

    Raises:
        ValueError: a manifest without its data's place, or data that are others by now.
    """
    tasks = [_task_again(run, device) for run in unfinished_business(study)]
    threads = max((task.argument.config.threads for task in tasks), default=1)
    return sweep_by(execution, tasks, device=device, threads=threads)


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
        folder = config.study_folder / run_id(resolved(config.data, cell, data))
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


def create_task(config: SweepConfig, cell: Cell, data: LabelledImages) -> Task:
    """A run of the grid with its folder; one that is there already is kept."""
    run = Run.create(
        config.study_folder,
        resolved(config.data, cell, data),
        label=cell.describe(),
        steps=cell.steps,
        data=places(config.data),
    )
    return _task(run, cell, config.data, config.device)


def _task_again(run: Run, device: str) -> Task:
    data, config = of_manifest(run, DataConfig, RunConfig)
    images = _loaded(data, torch.device("cpu"))
    # A manifest's counts are those of the run's own classes, whatever they were made from.
    counts, imbalance = config.class_counts, run.config["imbalance"]
    if imbalance != config.imbalance:
        config = replace(config, class_counts=(), imbalance=imbalance)
    images.check(counts)
    cell = Cell(config=config, class_counts=counts)
    if run_id(resolved(data, cell, images)) != run.id:
        raise ValueError(f"{run.folder}: its images are others by now")
    return _task(run, cell, data, device)


def _task(run: Run, cell: Cell, data: DataConfig, device: str) -> Task:
    recipe = Recipe(
        config=cell.config,
        class_counts=cell.class_counts,
        data=absolute(data),
        device=device,
        command=command_line(),
    )
    return Task(
        folder=run.folder.resolve(),
        work=work,
        argument=recipe,
        steps=cell.steps,
        label=cell.describe(),
    )


def work(attempt: Attempt, recipe: Recipe) -> None:
    """Do one run in this process."""
    device, config = resolve_device(recipe.device), recipe.config
    data = _loaded(recipe.data, device).subset(recipe.class_counts, config.seed)
    model, _ = build(config, data)
    attempt.update(
        **circumstances(
            _PACKAGES,
            device,
            data_hash=data.data_hash,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            command=recipe.command,
        )
    )

    def report(progress: Progress) -> None:
        attempt.advance(progress.step, progress.images_per_second, "images/s")

    train(config, data, attempt, report=report)


@functools.lru_cache(maxsize=1)
def _loaded(data: DataConfig, device: torch.device) -> LabelledImages:
    return load_images(data).to(device)


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


def resolved(data: DataConfig, cell: Cell, images: LabelledImages) -> dict[str, Any]:
    """What the id of a run over these images is the hash of."""
    return cell.config.resolved(data, cell.class_counts, images.data_hash)
