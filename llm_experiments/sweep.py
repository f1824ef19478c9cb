"""A grid of runs in child processes: finished ones are skipped, interrupted ones go on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from frequency_bins import Attempt, Diverged, Run, RunInUse, attempt, resolve_device
from frequency_bins.command_line import one_line
from llm_experiments.configs import RunConfig, SweepConfig
from llm_experiments.models.presets import build_model
from llm_experiments.preparation import PreparedCorpus, load_prepared, prepare
from llm_experiments.progress import SweepProgress
from llm_experiments.training import Progress, train

EARLIER = "finished earlier"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a child process needs to know of one run."""

    folder: Path
    config: RunConfig
    corpus: Path
    command: str
    save_model: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: finished, diverged, failed, or in use by another process."""

    status: str
    error: str = ""
    is_users: bool = False
    """whether the error is the user's to mend (a full disk, say), and stops the sweep"""


def sweep(*grids: SweepConfig) -> dict[str, int]:
    """Run what is missing of one or more grids; returns how many runs ended in each status.

    Runs that are finished or known to diverge are skipped. Every run has a lock, so two sweeps
    started at once do no run twice.

    Raises:
        ValueError, OSError: what the user has to mend; runs interrupted by it can go on later.
    """
    device = resolve_device(grids[0].device)
    with contextlib.closing(SweepProgress()) as progress:
        progress.say(f"preparing corpus {grids[0].data.corpus!r} ...")
        tasks = list({task.folder: task for grid in grids for task in create_tasks(grid)}.values())
        pending = [task for task in tasks if not Run(task.folder).is_done()]
        counts = {EARLIER: len(tasks) - len(pending)}
        progress.start([task.config for task in pending], done=len(tasks) - len(pending))
        parallel = _parallelism(grids[0], device)
        for task, outcome in _in_children(deque(pending), device, parallel, progress):
            if outcome.is_users:
                raise ValueError(outcome.error)
            counts[outcome.status] = counts.get(outcome.status, 0) + 1
            progress.ended(task.config, task.folder.name, outcome.status, outcome.error)
    return counts


def create_tasks(grid: SweepConfig) -> list[Task]:
    """The grid's runs, each with its folder; those that are there already are kept."""
    corpus = prepare(grid.data)
    return [
        Task(
            folder=Run.create(grid.study_folder, cell.resolved(grid.data, corpus.data_hash)).folder,
            config=cell,
            corpus=corpus.folder,
            command=shlex.join(["python", *sys.orig_argv[1:]]),
            save_model=grid.save_model,
        )
        for cell in grid.cells()
    ]


def _parallelism(config: SweepConfig, device: torch.device) -> int:
    if config.runs_in_parallel is not None:
        return config.runs_in_parallel
    if device.type == "cuda":
        return torch.cuda.device_count()
    return max(1, len(os.sched_getaffinity(0)) // config.training.threads)


def _in_children(
    pending: deque[Task], device: torch.device, parallel: int, progress: SweepProgress
) -> Iterator[tuple[Task, Outcome]]:
    """Hand out tasks to child processes, and yield each with its outcome."""
    children: dict[Connection, _Child] = {}
    numbers = deque(range(min(parallel, len(pending))))
    try:
        while pending or children:
            while pending and numbers:
                child = _Child(numbers.popleft(), device)
                children[child.connection] = child
                child.give(pending.popleft())
            for connection in wait(list(children)):
                child = children[connection]
                message = child.receive()
                if isinstance(message, Progress):
                    progress.advanced(child.task.folder.name, child.task.config, message)
                    continue
                yield child.task, message
                if child.is_alive and pending:
                    child.give(pending.popleft())
                else:
                    numbers.append(child.number)
                    children.pop(connection).stop()
    finally:
        for child in children.values():
            child.stop()


class _Child:
    """A process that does one run after another, so that its imports are paid for once."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = number
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        if device.type == "cuda":
            device = torch.device("cuda", number % torch.cuda.device_count())
        self._process = context.Process(target=_work, args=(theirs, device), daemon=True)
        self._process.start()
        theirs.close()
        self.is_alive = True

    def give(self, task: Task) -> None:
        self.task = task
        self.connection.send(task)

    def receive(self) -> Progress | Outcome:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            self.is_alive = False
            error = f"its process died (exit code {self._process.exitcode})"
            return Outcome(status="failed", error=error)

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _work(connection: Connection, device: torch.device) -> None:
    """The child process: does the tasks that come, until it is stopped or its parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    threading.Thread(target=_die_with_parent, daemon=True).start()
    while True:
        task = connection.recv()
        connection.send(_attempt(task, device, connection))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _attempt(task: Task, device: torch.device, connection: Connection) -> Outcome:
    try:
        with attempt(Run(task.folder)) as mine:
            return _locked_attempt(task, mine, device, connection)
    except RunInUse:
        return Outcome(status="in use", error="another process is doing it")


def _locked_attempt(
    task: Task, mine: Attempt, device: torch.device, connection: Connection
) -> Outcome:
    if mine.run.is_done():  # by another sweep, meanwhile
        return Outcome(status="finished")
    if mine.run.status == "finished":
        mine.withdraw()
    try:
        corpus = load_prepared(task.corpus)
        mine.update(**circumstances(task, corpus, device))
        train(
            task.config,
            corpus,
            mine,
            device=device,
            report=connection.send,
            keep_model=task.save_model,
        )
        return Outcome(status="finished")
    except Diverged as error:
        mine.status, mine.error = "diverged", str(error)
        return Outcome(status="diverged", error=str(error))
    except Exception as error:
        is_users = isinstance(error, OSError | ValueError | torch.OutOfMemoryError)
        line = one_line(error)
        if isinstance(error, torch.OutOfMemoryError):
            line = f"out of memory on {device}; lower --batch-size or --context"
        if not is_users:
            traceback.print_exc()
            line = f"{type(error).__name__}: {line}"
        mine.status, mine.error = "failed", line
        return Outcome(status="failed", error=line, is_users=is_users)


def circumstances(task: Task, corpus: PreparedCorpus, device: torch.device) -> dict[str, Any]:
    """What the manifest tells of how a run was done, beside its config."""
    model = build_model(
        task.config.model,
        vocab_size=corpus.vocab_size,
        tied=task.config.tie_embeddings,
        device="meta",
    )
    packages = ("torch", "transformers", "tokenizers", "numpy", "xarray", "h5netcdf")
    return {
        "versions": {
            "python": sys.version.split()[0],
            **{package: version(package) for package in packages},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "git_commit": _git_commit(),
        "data_hash": corpus.data_hash,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": task.command,
    }


def _git_commit() -> str | None:
    command = ("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None
