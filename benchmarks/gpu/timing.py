"""Time and memory on a device."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def moment(device: torch.device) -> Any:
    """A mark in the device's stream of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def intervals(marks: Sequence[Any]) -> list[float]:
    """Milliseconds between marks."""
    if isinstance(marks[0], float):
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def timed(action: Callable[[], object], device: torch.device, warm_up: int, n: int) -> list[float]:
    """Milliseconds of each of ``n`` calls."""
    for _ in range(warm_up):
        action()
    marks = [moment(device)]
    for _ in range(n):
        action()
        marks.append(moment(device))
    return intervals(marks)


def mean_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Of ten calls, after the first ones."""
    return statistics.mean(timed(action, device, 5, 10)) / 1e3


def matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a product of two square random matrices, its mean time taken."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / mean_seconds(lambda: left @ right, device)


def peak_gib(device: torch.device) -> float | None:
    """Most memory that tensors have taken, or None on a CPU; the next peak starts here."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak
