"""A grid of runs: what an executor has to do for each, and how to do the failed ones again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_experiments.configs import DataConfig, Parallel, RunConfig, SweepConfig
from llm_experiments.models.presets import Norm, build_model, router_parameters
from llm_experiments.text.preparation import PreparedCorpus, load_prepared, prepare
from llm_experiments.training.distributed import (
    Follower,
    Group,
    follow,
    group_errors,
    join,
    lead,
    processes,
)
from llm_experiments.training.loop import Progress, train
from llm_experiments.training.optimization import check_row_decays, loss_weights
from run_store import Attempt, Diverged, Run, Stopped, resolve_device, run_id
from run_store.circumstances import circumstances, command_line, of_manifest, places
from run_store.executors import (
    EARLIER,
    ExecutorConfig,
    Pool,
    SweepProgress,
    Task,
    open_pool,
)
from run_store.executors import sweep as run_tasks
from run_store.status import unfinished_business

__all__ = ["EARLIER", "create_tasks", "retry", "sweep"]

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "xarray", "h5netcdf")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a worker needs to know of one run, beside its folder."""

    config: RunConfig
    corpus: Path
    checkpoint: Path | None
    device: str
    parallel: Parallel
    command: str
    save_model: bool


def sweep(*grids: SweepConfig) -> dict[str, int]:
    """Run what is missing of one or more grids; returns how many runs ended in each status.

    Raises:
        ValueError, OSError: what the user has to mend; see `run_store.executors.sweep`.
    """
    first = grids[0]
    if first.execution.executor == "local":
        resolve_device(first.device)
    group = join(first.parallel, first.device)
    if not group.leads:
        follow(group, functools.partial(_follow, group))
        return {}
    with contextlib.closing(SweepProgress()) as progress, _workers(group, first) as open_it:
        progress.say(f"preparing corpus {first.data.corpus!r} ...")
        tasks = [task for grid in grids for task in create_tasks(grid)]
        return run_tasks(tasks, open_it, progress)


@contextlib.contextmanager
def _workers(group: Group, grid: SweepConfig) -> Iterator[Callable[[int], Pool]]:
    """What opens the pool of a sweep: its executor's, or the processes of torchrun."""
    if group.size == 1:
        yield _opener(grid.execution, grid.device, grid.training.threads)
        return
    with lead(group) as pool:
        if grid.training.batch_size % group.size:
            raise ValueError(
                f"batch_size is {grid.training.batch_size}; expected a multiple of the "
                f"{group.size} processes"
            )
        if grid.execution != ExecutorConfig():
            raise ValueError("torchrun does one run at a time; expected no option of an executor")
        yield lambda calls: pool


def retry(study: Path, execution: ExecutorConfig, device: str = "auto") -> dict[str, int]:
    """Run the failed and lost runs of a study again, from what their manifests hold.

    Raises:
        ValueError: a manifest without its data's place, or data that are others by now; several
            processes of torchrun.
    """
    if processes() > 1:
        raise ValueError(
            f"retry does a run in one process, not in {processes()} of torchrun; expected the "
            "sweep's own command under it, which does failed runs again too"
        )
    runs = unfinished_business(study)
    with contextlib.closing(SweepProgress()) as progress:
        tasks = [_task_again(run, device) for run in runs]
        threads = max((task.argument.config.threads for task in tasks), default=1)
        return run_tasks(tasks, _opener(execution, device, threads), progress)


def create_tasks(grid: SweepConfig) -> list[Task]:
    """The grid's runs, each with its folder; those that are there already are kept."""
    corpus = prepare(grid.data)
    cells = grid.cells()
    for cell in cells:  # before any run starts
        loss_weights(corpus.class_counts, cell.loss_weight_exponent)
        check_row_decays(cell, corpus.class_counts)
    return [create_task(grid, cell, corpus) for cell in cells]


def _opener(execution: ExecutorConfig, device: str, threads: int) -> Callable[[int], Pool]:
    return functools.partial(open_pool, execution, device=device, threads=threads)


def create_task(grid: SweepConfig, cell: RunConfig, corpus: PreparedCorpus) -> Task:
    """A run of the grid with its folder; one that is there already is kept."""
    run = Run.create(
        grid.study_folder,
        cell.resolved(grid.data, corpus.data_hash),
        label=cell.describe(),
        steps=cell.steps,
        data=places(grid.data),
        save_model=grid.save_model,
    )
    return _of(run, cell, corpus, grid.data, grid.device, grid.save_model, grid.parallel)


def _task_again(run: Run, device: str) -> Task:
    data, cell = of_manifest(run, DataConfig, RunConfig)
    corpus = _prepared(data)
    if run_id(cell.resolved(data, corpus.data_hash)) != run.id:
        raise ValueError(f"{run.folder}: its corpus or checkpoint is another one by now")
    return _of(run, cell, corpus, data, device, bool(run.manifest.get("save_model")))


def _of(
    run: Run,
    cell: RunConfig,
    corpus: PreparedCorpus,
    data: DataConfig,
    device: str,
    save_model: bool,
    parallel: Parallel = "ddp",
) -> Task:
    recipe = Recipe(
        config=cell,
        corpus=corpus.folder.resolve(),
        checkpoint=data.checkpoint_dir and data.checkpoint_dir.resolve(),
        device=device,
        parallel=parallel,
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
    """Do one run in this process, and in those that follow it."""
    device, group = resolve_device(recipe.device), join(recipe.parallel, recipe.device)
    corpus, config = _loaded(recipe.corpus), recipe.config
    together = {} if group.size == 1 else {"processes": group.size, "parallel": group.parallel}
    attempt.update(
        **circumstances(
            _PACKAGES,
            device,
            data_hash=corpus.data_hash,
            **_sizes(config.model, corpus.vocab_size, config.tie_embeddings, config.norm),
            command=recipe.command,
            **together,
        )
    )

    def report(progress: Progress) -> None:
        attempt.advance(progress.step, progress.tokens_per_second, "tokens/s")

    with group_errors():
        if group.size > 1:
            group.tell((recipe, attempt.folders()))
        train(
            config,
            corpus,
            attempt,
            device=device,
            report=report,
            checkpoint=recipe.checkpoint,
            keep_model=recipe.save_model,
            group=group,
        )


def _follow(group: Group, recipe: Recipe, follower: Follower) -> None:
    """This process's part of a run that the first one writes."""
    device, corpus = resolve_device(recipe.device), load_prepared(recipe.corpus)
    with contextlib.suppress(Diverged, Stopped):  # as the first process finds too
        train(
            recipe.config,
            corpus,
            follower,
            device=device,
            checkpoint=recipe.checkpoint,
            keep_model=recipe.save_model,
            group=group,
        )


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path) -> PreparedCorpus:
    return load_prepared(folder)


@functools.lru_cache(maxsize=1)
def _prepared(data: DataConfig) -> PreparedCorpus:
    return prepare(data)


@functools.cache
def _sizes(model: str, vocab_size: int, tied: bool, norm: Norm) -> dict[str, int]:
    """How many parameters a model has, and how many of them are a router's, if any."""
    built = build_model(model, vocab_size=vocab_size, tied=tied, norm=norm, device="meta")
    sizes = {"parameters": sum(parameter.numel() for parameter in built.parameters())}
    return sizes | ({"router_parameters": r} if (r := router_parameters(built)) else {})
