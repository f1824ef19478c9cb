"""Sweeps of runs on whatever there is: child processes, a Ray cluster, Slurm.

A room makes a `Task` of each run; `sweep` does what is missing of them. Workers leave everything
in the run store (attempts.py), so no result travels through an executor, and whoever reads the
store knows how the sweep stands (status.py).
"""

from __future__ import annotations

from run_store.executors.opening import open_pool
from run_store.executors.pools import ExecutorConfig, Pool, WorkerDied
from run_store.executors.progress import SweepProgress
from run_store.executors.sweep import EARLIER, sweep, sweep_by
from run_store.executors.tasks import Outcome, Task, do

__all__ = [
    "EARLIER",
    "ExecutorConfig",
    "Outcome",
    "Pool",
    "SweepProgress",
    "Task",
    "WorkerDied",
    "do",
    "open_pool",
    "sweep",
    "sweep_by",
]
