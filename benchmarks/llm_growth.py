"""Peak memory and time of a training step as vocabulary, context and model grow, beside the plan.

    python -m benchmarks.llm_growth [--axis vocabulary context width layers]

OpenELM from a middle size on, one of the four numbers growing while the others stay. Every point is
a process of its own, which first does a small step (that leaves threads and buffers behind), then
five steps of the real size: forward, loss head, backward, token metrics, AdamW. "Step" is the CPU
time of one thread, the median of the last four; "resident" the peak of the process's memory beyond
the small step, where glibc keeps freed memory as training asks it to; "default" the same without
that. It keeps it in pieces, so both are more than was ever in use at once, which "in use" is: the
peak in another process, with every large tensor in a mapping of its own. "Plan" is what
`python -m llm_experiments plan` says of the same step: the peak of its memory, and floating-point
operations. Exponents are slopes in double logarithms between the two largest points.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frequency_bins import ClassMetrics
from llm_experiments.configs import RunConfig
from llm_experiments.models.openelm import OpenELMConfig, OpenELMForCausalLM
from llm_experiments.plan import activation_bytes, flops_per_token, head_bytes, peak_bytes
from llm_experiments.training.loop import token_losses
from llm_experiments.training.memory import keep_freed_memory
from llm_experiments.training.optimization import build_optimizer

TIMED_STEPS, COUNTED_STEPS = 5, 2
M_MMAP_THRESHOLD, LARGE = -3, 2**16  # mallopt(3)
MEMORY = ("resident", "default", "in use", "plan")
C = ctypes.CDLL(None)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Size:
    """Of a model and of its batch."""

    vocabulary: int = 4096
    context: int = 64
    width: int = 128
    layers: int = 4
    batch: int = 16

    def model(self, device: str = "cpu") -> Any:
        with torch.device(device):
            return OpenELMForCausalLM(
                OpenELMConfig(
                    vocab_size=self.vocabulary,
                    num_transformer_layers=self.layers,
                    model_dim=self.width,
                    head_dim=32,
                    ffn_dim_divisor=32,
                    max_context_length=max(self.context, 2048),
                )
            )


GROWN = {
    "vocabulary": (1024, 4096, 16384, 65536),
    "context": (64, 256, 512, 1024),
    "width": (128, 256, 512, 1024),
    "layers": (2, 4, 8, 16),
}


def step_times(size: Size, steps: int) -> list[float]:
    """CPU seconds of each of a few training steps."""
    model = size.model()
    optimizer = build_optimizer(model, RunConfig(weight_decay=0.1))
    metrics = ClassMetrics(size.vocabulary)
    uniform = torch.ones(size.vocabulary, dtype=torch.float64)
    times = []
    for _ in range(steps):
        sequences = torch.randint(5, size.vocabulary, (size.batch, size.context))
        begin = time.process_time()
        losses, targets = token_losses(model, sequences, uniform)
        losses.objective.backward()
        metrics.update(losses.loss, targets, losses.correct)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.process_time() - begin)
    return times


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def peak(size: Size, steps: int) -> tuple[int, float]:
    """Bytes at the peak of a few steps beyond what was there before, and seconds a step."""
    step_times(Size(vocabulary=300, context=8, width=64, layers=1, batch=2), 1)
    gc.collect()
    C.malloc_trim(0)
    CLEAR.write_text("5")  # sets the peak to what is resident now (proc(5))
    before = resident("VmRSS")
    times = step_times(size, steps)
    return resident("VmHWM") - before, statistics.median(times[1:])


def peak_as_trained(size: Size) -> tuple[int, float]:
    """The peak where freed memory is kept."""
    keep_freed_memory()
    return peak(size, TIMED_STEPS)


def peak_in_use(size: Size) -> int:
    """The peak of what is in use, as nothing that is freed stays resident."""
    C.mallopt(M_MMAP_THRESHOLD, LARGE)
    return peak(size, COUNTED_STEPS)[0]


def measure(size: Size) -> dict[str, float]:
    """Memory in bytes, seconds a step, and the plan."""
    held, seconds = in_a_process(peak_as_trained, size)
    default, _ = in_a_process(peak, size, TIMED_STEPS)
    memory = {"resident": held, "default": default, "in use": in_a_process(peak_in_use, size)}
    return memory | {"seconds": seconds} | in_a_process(planned, size)


def planned(size: Size) -> dict[str, float]:
    """What the plan has for a step: parameters, bytes, floating-point operations."""
    model = size.model("meta")
    kept = activation_bytes(model, size.batch, size.context, half=None)
    head = head_bytes(model, size.batch, size.context, half=None, device_type="cpu")
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "plan": peak_bytes(model, kept, head, accumulates=False),
        "operations": flops_per_token(model, size.context) * size.batch * size.context,
    }


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a copy of this process, which has started no threads of torch."""
    context = multiprocessing.get_context("fork")
    with context.Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.apply(function, arguments)


def exponent(axis: str, rows: list[tuple[Size, dict[str, float]]], name: str) -> float:
    """The slope between the two largest points."""
    (small, below), (large, above) = rows[-2:]
    grown = getattr(large, axis) / getattr(small, axis)
    return math.log(above[name] / below[name]) / math.log(grown)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--axis", nargs="+", default=list(GROWN), choices=list(GROWN))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, one thread, from {Size()}")
    headings = ("grown", "to", "parameters", *MEMORY, "in use / plan", "step", "rate")
    print(f"| {' | '.join(headings)} |")
    print("|---" * len(headings) + "|")
    for axis in options.axis:
        rows = []
        for value in GROWN[axis]:
            size = replace(Size(), **{axis: value})
            found = measure(size)
            rows.append((size, found))
            memory = (f"{found[name] / 2**20:,.0f} MiB" for name in MEMORY)
            print(
                f"| {axis} | {value:,} | {found['parameters'] / 1e6:.2f}M | {' | '.join(memory)} "
                f"| {found['in use'] / found['plan']:.2f} | {1e3 * found['seconds']:,.0f} ms "
                f"| {found['operations'] / found['seconds'] / 1e9:.0f} GFLOP/s |",
                flush=True,
            )
        law = {name: exponent(axis, rows, name) for name in (*MEMORY, "seconds", "operations")}
        memory = (f"{law[name]:.2f}" for name in MEMORY)
        print(
            f"| {axis}, exponent | | | {' | '.join(memory)} | | {law['seconds']:.2f} "
            f"| operations {law['operations']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
