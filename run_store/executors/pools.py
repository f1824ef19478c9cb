"""What every executor offers, and how it is configured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

# A call whose process or node dies is made again this often.
RETRIES = 3
# From being asked to stop to being killed: a step and a checkpoint have to fit in. Kubernetes and
# Slurm give 30 s before they kill us.
GRACE_SECONDS = 25.0
# The same for a run that has come no step further yet; longer than its lease takes to say so.
SHORT_GRACE_SECONDS = 3.0


class WorkerDied(RuntimeError):
    """The process or machine that did a call died, time and again."""


@runtime_checkable
class Pool(Protocol):
    """Workers that make calls; as `concurrent.futures.Executor`, as far as it is used here."""

    width: int
    """calls that it makes sense to have submitted at once"""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function of a module. The future raises WorkerDied where all workers died."""

    def interrupt(self) -> None:
        """Ask workers to stop what they do, where this pool can reach them."""

    def close(self) -> None:
        """End the workers."""


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Where the runs of a sweep are done."""

    executor: Literal["local", "ray", "slurm"] = "local"
    """local: child processes of this one; ray: a Ray cluster; slurm: one job a run"""
    address: str | None = None
    """of a running Ray cluster ("auto": the one this machine is in); default: start one here"""
    gpus_per_run: int = 1
    """GPUs that a run needs, where the device is cuda"""
    runs_in_parallel: int | None = None
    """runs at once; default: one for every GPU, or every `threads` CPU cores; on a cluster as many
    as it has room for"""
    slurm_options: tuple[str, ...] = ()
    """options of sbatch, each as NAME=VALUE: partition=gpu time=240 mem=32G"""

    def __post_init__(self) -> None:
        if self.runs_in_parallel is not None and self.runs_in_parallel < 1:
            raise ValueError(f"runs_in_parallel is {self.runs_in_parallel}; expected at least 1")
        if self.gpus_per_run < 1:
            raise ValueError(f"gpus_per_run is {self.gpus_per_run}; expected at least 1")
        if self.address is not None and self.executor != "ray":
            raise ValueError(f"address is for --executor ray, not {self.executor}")
        if self.slurm_options and self.executor != "slurm":
            raise ValueError(f"slurm_options are for --executor slurm, not {self.executor}")
        for option in self.slurm_options:
            if not option.partition("=")[2]:
                raise ValueError(f"slurm option {option!r} is not of the form NAME=VALUE")
