"""A grid of runs: what an executor has to do for each, and how to do the failed ones again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from frequency_bins import Attempt, Run, resolve_device, run_id
from frequency_bins.circumstances import circumstances, command_line, of_manifest, places
from frequency_bins.executors import (
    EARLIER,
    ExecutorConfig,
    SweepProgress,
    Task,
    open_pool,
)
from frequency_bins.executors import sweep as run_tasks
from frequency_bins.status import unfinished_business
from llm_experiments.configs import DataConfig, RunConfig, SweepConfig
from llm_experiments.models.presets import build_model
from llm_experiments.preparation import PreparedCorpus, load_prepared, prepare
from llm_experiments.training import Progress, train

__all__ = ["EARLIER", "create_tasks", "retry", "sweep"]

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "xarray", "h5netcdf")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a worker needs to know of one run, beside its folder."""

    config: RunConfig
    corpus: Path
    device: str
    command: str
    save_model: bool


def sweep(*grids: SweepConfig) -> dict[str, int]:
    """Run what is missing of one or more grids; returns how many runs ended in each status.

    Raises:
        ValueError, OSError: what the user has to mend; see `frequency_bins.executors.sweep`.
    """
    first = grids[0]
    if first.execution.executor == "local":
        resolve_device(first.device)
    with contextlib.closing(SweepProgress()) as progress:
        progress.say(f"preparing corpus {first.data.corpus!r} ...")
        tasks = [task for grid in grids for task in create_tasks(grid)]
        return _run(tasks, first.execution, first.device, first.training.threads, progress)


def retry(study: Path, execution: ExecutorConfig, device: str = "auto") -> dict[str, int]:
    """Run the failed and lost runs of a study again, from what their manifests hold.

    Raises:
        ValueError: a manifest without its data's place, or data that are others by now.
    """
    runs = unfinished_business(study)
    with contextlib.closing(SweepProgress()) as progress:
        tasks = [_task_again(run, device) for run in runs]
        threads = max((task.argument.config.threads for task in tasks), default=1)
        return _run(tasks, execution, device, threads, progress)


def create_tasks(grid: SweepConfig) -> list[Task]:
    """The grid's runs, each with its folder; those that are there already are kept."""
    corpus = prepare(grid.data)
    return [_task(grid, cell, corpus) for cell in grid.cells()]


def _run(
    tasks: Sequence[Task],
    execution: ExecutorConfig,
    device: str,
    threads: int,
    progress: SweepProgress,
) -> dict[str, int]:
    open_it = functools.partial(open_pool, execution, device=device, threads=threads)
    return run_tasks(tasks, open_it, progress)


def _task(grid: SweepConfig, cell: RunConfig, corpus: PreparedCorpus) -> Task:
    run = Run.create(
        grid.study_folder,
        cell.resolved(grid.data, corpus.data_hash),
        label=cell.describe(),
        steps=cell.steps,
        data=places(grid.data),
        save_model=grid.save_model,
    )
    return _of(run, cell, corpus, grid.device, grid.save_model)


def _task_again(run: Run, device: str) -> Task:
    data, cell = of_manifest(run, DataConfig, RunConfig)
    corpus = prepare(data)
    if run_id(cell.resolved(data, corpus.data_hash)) != run.id:
        raise ValueError(f"{run.folder}: its corpus {data.corpus!r} is another one by now")
    return _of(run, cell, corpus, device, bool(run.manifest.get("save_model")))


def _of(run: Run, cell: RunConfig, corpus: PreparedCorpus, device: str, save_model: bool) -> Task:
    recipe = Recipe(
        config=cell,
        corpus=corpus.folder.resolve(),
        device=device,
        command=command_line(),
        save_model=save_model,
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
    device = resolve_device(recipe.device)
    corpus, config = _loaded(recipe.corpus), recipe.config
    attempt.update(
        **circumstances(
            _PACKAGES,
            device,
            data_hash=corpus.data_hash,
            parameters=_parameters(config.model, corpus.vocab_size),
            command=recipe.command,
        )
    )

    def report(progress: Progress) -> None:
        attempt.advance(progress.step, progress.tokens_per_second, "tokens/s")

    train(config, corpus, attempt, device=device, report=report, keep_model=recipe.save_model)


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> PreparedCorpus:
    return load_prepared(folder)


@functools.cache
def _parameters(model: str, vocab_size: int) -> int:
    built = build_model(model, vocab_size=vocab_size, device="meta")
    return sum(parameter.numel() for parameter in built.parameters())
