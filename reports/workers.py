"""Child processes for a report on many runs: one pool, started once and kept until the end."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
PARALLEL_FROM = 20  # runs of a report
MOST_PROCESSES = 8  # each takes seconds to start and some 0.5 GB


def parallel_map(
    function: Callable[[Task], Result], tasks: Sequence[Task], *, worth: int
) -> Iterator[Result]:
    """`function` of each task, in order; in child processes if there are at least `worth` tasks.

    Raises OSError where a child was ended from outside, as a machine out of memory does.
    """
    if len(tasks) < worth or (os.cpu_count() or 1) == 1:
        yield from map(function, tasks)
        return
    try:
        with _spawning():
            results = _pool().map(functools.partial(_tidily, os.getcwd(), function), tasks)
        yield from results
    except BrokenProcessPool:
        raise OSError("a child process of the report was ended (is the memory full?)") from None


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Have child processes that start now compute on one thread, and leave the main script alone.

    The script may lack a guard, and a child imports only what it is sent functions of: modules of
    ours. BLAS and OpenMP read their variable once, as they are loaded.
    """
    main, threads = sys.modules["__main__"], os.environ.get("OMP_NUM_THREADS")
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


@functools.cache
def _pool() -> ProcessPoolExecutor:
    # Not forked: a copy of a process whose torch has threads may wait for them for ever.
    return ProcessPoolExecutor(
        min(os.cpu_count() or 1, MOST_PROCESSES),
        multiprocessing.get_context("spawn"),
    )


def _tidily(folder: str, function: Callable[[Task], Result], task: Task) -> Result:
    _keep_imports()
    os.chdir(folder)  # the caller's, which may be another one than when the pool was started
    try:
        return function(task)
    finally:
        gc.collect()  # readers of files refer to themselves, and so keep a record's bytes


@functools.cache
def _keep_imports() -> None:
    """What was imported for the first task stays: later collections need not look at it."""
    gc.freeze()
