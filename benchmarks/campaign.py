"""Full-size runs that are missing, the most telling first: as many as fit in some minutes.

    benchmarks/campaign.sh MINUTES [--imdb FOLDER] [--cifar10 FOLDER] [--runs FOLDER] [--out FOLDER]
    benchmarks/campaign.sh 1 --dry-run                   # tiny, on a CPU: tests this file

Table 1 of the paper (weight decays 1 and 0 first, then further decays, then further seeds),
Figure 9's grid of images, a run of each other model of Figure 1, and the repair of decay 1 by loss
weights. A run whose small file (`python -m reports shrink`) is in OUT/<study> is not done again. In
time, a run at work is stopped with a checkpoint in RUNS, from which the same command goes on; then
what is finished is written to OUT: at most 1 MB a run, 40 MB in all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_experiments import configs as text
from llm_experiments import recipes as text_recipes
from llm_experiments import sweep as text_sweep
from llm_experiments.text.preparation import prepare
from reports.shrunken import shrink
from run_store import read_study, resolve_device, run_id
from run_store.command_line import run_command
from run_store.executors import ExecutorConfig, Task, sweep_by
from run_store.executors.command_line import print_counts
from vision_appendix import configs as images
from vision_appendix import recipes as image_recipes
from vision_appendix import sweep as image_sweep
from vision_appendix.imbalanced_cifar10 import load_images

# For a checkpoint of the run at work, and the small files.
_MARGIN_SECONDS = 60


def grids(options: argparse.Namespace) -> list[text.SweepConfig | images.SweepConfig]:
    """All that is wanted, in order; a grid's seeds are its slowest axis."""
    (table1,) = text_recipes.table1()
    _, *others = text_recipes.figure1()
    repair = text_recipes.repair()[0]
    wanted = [
        replace(table1, weight_decays=(1.0, 0.0, 0.3, 0.1, 0.5)),
        image_recipes.figure9(),
        *(replace(other, weight_decays=(1.0,), seeds=(0,)) for other in others),
        replace(repair, weight_decays=(1.0,), loss_weight_exponents=(0.25, 0.5)),
    ]
    return [_here(grid, options) for grid in wanted]


def _here(grid: Any, options: argparse.Namespace) -> Any:
    """A grid with this machine's folders and device, and of tiny runs in a dry run."""
    is_text = isinstance(grid, text.SweepConfig)
    data_dir = options.imdb if is_text else options.cifar10
    grid = replace(
        grid,
        runs_dir=options.runs,
        device="cpu" if options.dry_run else "cuda",
        data=replace(grid.data, data_dir=data_dir, cache_dir=options.cache),
    )
    if not options.dry_run:
        return grid
    if is_text:
        tiny: dict[str, Any] = {
            "steps": 2,
            "batch_size": 2,
            "evaluate_every": 1,
            "precision": "fp32",
        }
        sizes = {"vocab_size": 300, "context": 8, "num_sequences": 8}
        training = replace(grid.training, **tiny, warmup_steps=1, accumulation=1, compile=False)
        data = replace(grid.data, corpus="text" if options.imdb else "python-docs", **sizes)
        model = "openelm-tiny" if "openelm" in grid.models[0] else "qwen2-tiny"
        return replace(grid, models=(model,), training=training, data=data)
    data = replace(grid.data, dataset="digits", data_dir=None)
    training = replace(grid.training, epochs=1, width=1, crop_padding=1, cutout=0)
    return replace(grid, seeds=grid.seeds[:1], training=training, data=data)


def missing(grid: text.SweepConfig | images.SweepConfig, out: Path) -> Iterator[Task]:
    """The runs of a grid that have no small file yet."""
    kept = {path.stem for path in (out / grid.study).glob("*.json")}
    if isinstance(grid, text.SweepConfig):
        corpus = prepare(grid.data)
        for cell in grid.cells():
            if run_id(cell.resolved(grid.data, corpus.data_hash)) not in kept:
                yield text_sweep.create_task(grid, cell, corpus)
        return
    data = load_images(grid.data)
    for part in image_sweep.resolve_cells(grid, data):
        if run_id(image_sweep.resolved(grid.data, part, data)) not in kept:
            yield image_sweep.create_task(grid, part, data)


def _possible(grid: text.SweepConfig | images.SweepConfig, out: Path) -> list[Task] | None:
    """Those missing; None where the grid's data cannot be had, which is said."""
    try:
        return list(missing(grid, out))
    except (ValueError, OSError) as error:
        print(f"{grid.study} is left out: {error}")
        return None


def keep(studies: Sequence[Path], out: Path) -> list[Path]:
    """The small files of what is finished in the studies."""
    finished = [study for study in studies if study.is_dir() and read_study(study).runs]
    return [path for study in finished for path in shrink(study, out / study.name)]


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("minutes", type=float, help="all in all; a minute of it is for stopping")
    found.add_argument("--imdb", type=Path, help="folder of IMDB; without, it is downloaded")
    found.add_argument("--cifar10", type=Path, help="CIFAR-10's; without, it is downloaded")
    found.add_argument("--runs", type=Path, default=Path("runs"))
    found.add_argument("--out", type=Path, default=Path("measured"), help="of the small files")
    found.add_argument("--cache", type=Path, default=Path("cache"), help="of the prepared corpus")
    found.add_argument("--dry-run", action="store_true", help="tiny runs on the CPU")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where all is done or time is up; 1 where a run failed."""
    options = parser().parse_args(arguments)
    if not 0 < (seconds := 60 * options.minutes - _MARGIN_SECONDS * (not options.dry_run)) < 1e9:
        raise ValueError(f"minutes is {options.minutes:g}; expected more than 1 of a campaign")
    wanted = grids(options)
    resolve_device(wanted[0].device)
    studies = list(dict.fromkeys(grid.study_folder for grid in wanted))
    counts: dict[str, int] = {}
    try:
        with _time_limit(seconds):
            possible = [_possible(grid, options.out) for grid in wanted]
            if all(tasks is None for tasks in possible):
                raise ValueError("the data of no grid can be had; see --imdb and --cifar10")
            tasks = [task for of_grid in possible for task in of_grid or []]
            counts = sweep_by(ExecutorConfig(), tasks, device=wanted[0].device, threads=1)
    finally:
        for path in keep(studies, options.out):
            print(f"{path}: {path.stat().st_size:,} bytes")
    return print_counts(options.runs, counts)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stop what is inside as SIGTERM stops it, and go on behind it; another's SIGTERM ends all."""
    up = threading.Event()

    def end() -> None:
        up.set()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    except SystemExit:
        if not up.is_set():
            raise
        print("time is up: the same command goes on from here")
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(run_command(main))
