"""A phase diagram in runs of a study, wherever an executor finds room; the bits are `phase`'s.

A run solves some blocks of the diagram's points. In its record (run_store.records) a step is
a point: loss of every class, and accuracy 1 where it is learned, 0 where it collapsed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from tyro.conf import OmitArgPrefixes

from run_store import Attempt, Run, Stopped, class_record, resolve_device, run_id
from run_store.circumstances import circumstances, command_line
from run_store.command_line import parse_options
from run_store.executors import ExecutorConfig, Task, sweep_by
from run_store.executors.command_line import (
    StudyOptions,
    print_counts,
    retry_command,
    status_command,
)
from run_store.status import unfinished_business
from ufm.files import check_folder
from ufm.phase_diagram.grid import Part, PhaseGrid, points_at_once, report_diagram, solve_points

_PROGRAM = "python -m ufm"
_PACKAGES = ("torch", "numpy", "xarray", "h5netcdf")


@dataclass(frozen=True, kw_only=True)
class Sweep(StudyOptions):
    """A phase diagram by runs that an executor does, interrupted and gone on with at will."""

    study: str = "phase"
    """name of the study's folder"""
    grid: OmitArgPrefixes[PhaseGrid] = field(default_factory=PhaseGrid)
    blocks_per_run: int = 4
    """a block is what the solver takes at once: 524 points of 11 classes on a CPU"""
    device: str = "cpu"
    """auto, cpu or cuda"""
    threads: int = 1
    """CPU threads of a run"""
    output: Path = Path("phase")
    """stem of the files: .csv and .png are added"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("blocks_per_run", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a run does: the points from `first` to before `last` of a diagram."""

    grid: PhaseGrid
    first: int
    last: int
    device: str
    threads: int
    command: str

    def config(self) -> dict[str, Any]:
        """What the run's id is the hash of."""
        where = {"first": self.first, "last": self.last, "threads": self.threads}
        grid = asdict(self.grid)
        if not self.grid.feature_sharing:
            del grid["feature_sharing"]  # runs made before there was a choice keep their ids
        return {"experiment": "ufm phase"} | grid | where

    def describe(self) -> str:
        """The run in a few words."""
        decays = self.grid.decays
        return f"lambda {decays[self.first]:.3g} to {decays[self.last - 1]:.3g}"


def work(attempt: Attempt, piece: Piece) -> None:
    """Solve a piece in this process and publish it; there is nothing to go on from within one."""
    device = resolve_device(piece.device)
    torch.set_num_threads(piece.threads)
    attempt.update(**circumstances(_PACKAGES, device, command=piece.command))
    attempt.resume(0)
    parts: list[Part] = []
    begin, done = time.perf_counter(), 0
    parts_to_do = solve_points(piece.grid, first=piece.first, last=piece.last, device=str(device))
    for part in parts_to_do:
        parts.append(part)
        done += len(part.loss)
        attempt.advance(done, done / (time.perf_counter() - begin), "problems/s")
        attempt.append_scalars({"step": done, "loss": float(part.loss.mean())})
        if attempt.should_stop():
            raise Stopped(f"after {done} points")
    attempt.publish(_record(piece.grid, Part.joined(parts)))


def _record(grid: PhaseGrid, found: Part) -> xr.Dataset:
    counts, points = np.array(grid.counts), len(found.loss)
    loss, learned = found.loss.numpy(), (~found.collapsed).double().numpy()
    return class_record(
        steps=range(1, points + 1),
        class_counts=counts,
        labels=[str(count) for count in grid.counts],
        count=np.broadcast_to(counts, loss.shape),
        loss=loss,
        accuracy=learned,
        final_count=counts,
        final_loss=loss[-1],
        final_accuracy=learned[-1],
    )


def _part(run: Run) -> Part:
    record = run.classes(only=("loss", "accuracy"))
    return Part(
        loss=torch.from_numpy(record["loss"].values),
        collapsed=torch.from_numpy(record["accuracy"].values == 0),
    )


def sweep(options: Sweep) -> dict[str, int]:
    """Do what is missing of a diagram; returns how many runs ended in each status.

    Raises:
        ValueError, OSError: what the user has to mend; see `run_store.executors.sweep`.
    """
    if options.execution.executor == "local":
        resolve_device(options.device)
    tasks = [_task(_create(options, piece), piece) for piece in _pieces(options)]
    return sweep_by(options.execution, tasks, device=options.device, threads=options.threads)


def retry(study: Path, execution: ExecutorConfig, device: str = "auto") -> dict[str, int]:
    """Run the failed and lost runs of a study again, from what their manifests hold.

    Raises:
        ValueError: a run that is no part of a phase diagram.
    """
    tasks = [_task(run, _piece_of(run, device)) for run in unfinished_business(study)]
    threads = max((task.argument.threads for task in tasks), default=1)
    return sweep_by(execution, tasks, device=device, threads=threads)


def _pieces(options: Sweep) -> list[Piece]:
    # Where "auto" is a GPU, its blocks hold several of these.
    device = "cpu" if options.device == "auto" else options.device
    size = options.blocks_per_run * points_at_once(options.grid, device)
    ends = range(0, options.grid.points, size)
    return [
        Piece(
            grid=options.grid,
            first=first,
            last=min(first + size, options.grid.points),
            device=options.device,
            threads=options.threads,
            command=command_line(),
        )
        for first in ends
    ]


def _piece_of(run: Run, device: str) -> Piece:
    config = run.config
    try:
        fields = PhaseGrid.__dataclass_fields__
        named = {name: value for name, value in config.items() if name in fields}
        grid = PhaseGrid(**(named | {"class_counts": tuple(named["class_counts"])}))
        where = {name: config[name] for name in ("first", "last", "threads")}
        piece = Piece(grid=grid, device=device, command=command_line(), **where)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run.folder} is no part of a phase diagram: {error}") from None
    if run_id(piece.config()) != run.id:
        raise ValueError(f"{run.folder} was made by another version; sweep again instead")
    return piece


def _create(options: Sweep, piece: Piece) -> Run:
    steps = piece.last - piece.first
    return Run.create(options.study_folder, piece.config(), label=piece.describe(), steps=steps)


def _task(run: Run, piece: Piece) -> Task:
    return Task(
        folder=run.folder.resolve(),
        work=work,
        argument=piece,
        steps=piece.last - piece.first,
        label=piece.describe(),
    )


def _sweep_command(argv: list[str]) -> int:
    options: Sweep = parse_options(Sweep, argv, prog=f"{_PROGRAM} sweep")
    check_folder(options.output)
    code = print_counts(options.study_folder, sweep(options))
    runs = [Run(options.study_folder / run_id(piece.config())) for piece in _pieces(options)]
    if not all(run.status == "finished" for run in runs):
        return code or 1
    return report_diagram(options.grid, Part.joined([_part(run) for run in runs]), options.output)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "sweep": _sweep_command,
    "status": lambda argv: status_command(_PROGRAM, argv),
    "retry": lambda argv: retry_command(_PROGRAM, argv, retry),
}
