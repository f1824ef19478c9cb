"""Which executor a sweep gets: child processes of this machine, a Ray cluster, Slurm."""

from __future__ import annotations

import os

from run_store.devices import resolve_device
from run_store.executors.local import LocalPool
from run_store.executors.pools import ExecutorConfig, Pool
from run_store.executors.ray import RayPool
from run_store.executors.slurm import SlurmPool


def open_pool(config: ExecutorConfig, calls: int, *, device: str, threads: int) -> Pool:
    """The pool of an executor, for `calls` calls of `threads` CPU threads each.

    `device` is auto, cpu or cuda; auto is cuda on Slurm, and on Ray where the cluster has GPUs.

    Raises:
        ValueError: too few GPUs here, or the executor's package is not installed.
    """
    # Threads that wait for each other spin by default, on cores that others could use.
    # OpenMP reads this when torch is imported, in the processes that the pool starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if config.executor == "local":
        return _local(config, device, threads, calls)
    width = config.runs_in_parallel or calls
    if config.executor == "ray":
        return RayPool(width, config, device=device, threads=threads)
    return SlurmPool(width, config, device=device, threads=threads)


def _local(config: ExecutorConfig, device: str, threads: int, calls: int) -> Pool:
    if device == "cpu" or resolve_device(device).type != "cuda":
        width = max(1, len(os.sched_getaffinity(0)) // threads)
        return LocalPool(min(calls, config.runs_in_parallel or width))
    import torch

    there, each = torch.cuda.device_count(), config.gpus_per_run
    if there < each:
        raise ValueError(f"gpus_per_run is {each}; this machine has {there}")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(number) for number in range(there)]
    sets = [",".join(names[i : i + each]) for i in range(0, there - each + 1, each)]
    return LocalPool(min(calls, config.runs_in_parallel or len(sets)), sets)
