"""Runs of about a second with checkpoints, for faults to hit, and a sweep of them as a process.

A run is a walk whose every step is a pure function of (seed, step), so that an interrupted one
ends with the bytes of one that was not. Whoever publishes it says so in a file.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from run_store import Attempt, Run, Stopped, class_record, write_atomically
from run_store.command_line import run_command
from run_store.executors import EARLIER, ExecutorConfig, SweepProgress, Task, open_pool, sweep
from run_store.tests.executors.inline_pool import InlinePool

CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What a run is made of."""

    seed: int
    steps: int
    size: int
    """side of the matrices multiplied at every step, which takes its time"""
    checkpoint_every: int


def walk(attempt: Attempt, config: Walk) -> None:
    """Do a run from its latest checkpoint."""
    folders = attempt.folders()
    found = [(int(p.stem.split("-")[1]), p) for f in folders for p in f.glob("checkpoint-*.npy")]
    step, path = max(found, default=(0, None))
    place = np.zeros(CLASSES) if path is None else np.load(path, allow_pickle=False)
    attempt.resume(step, None if path is None else path.parent)
    while step < config.steps:
        place = place + _move(config, step)
        step += 1
        attempt.advance(step, 1.0, "steps/s")
        stop = attempt.should_stop()
        if stop or step % config.checkpoint_every == 0:
            content = _npy(place)
            write_atomically(attempt.folder / f"checkpoint-{step}.npy", content)
            attempt.append_scalars({"step": step, "loss": float(place[0])})
        if stop:
            raise Stopped(f"at step {step}")
    attempt.publish(_record(config, place))
    with open(attempt.run.folder / "ends", "ab", buffering=0) as file:
        file.write(f"{os.getpid()}\n".encode())


def _move(config: Walk, step: int) -> NDArray[np.float64]:
    matrix = np.random.default_rng((config.seed, step)).standard_normal((config.size, config.size))
    return np.sort((matrix @ matrix)[0])[:CLASSES]


def _npy(array: NDArray[np.float64]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _record(config: Walk, place: NDArray[np.float64]) -> Any:
    ones = np.ones((1, CLASSES))
    loss = 1 + np.abs(place)
    return class_record(
        steps=[config.steps],
        class_counts=np.ones(CLASSES, dtype=int),
        labels=[str(number) for number in range(CLASSES)],
        count=ones.astype(int),
        loss=loss[None],
        accuracy=ones,
        final_count=np.ones(CLASSES, dtype=int),
        final_loss=loss,
        final_accuracy=ones[0],
    )


def tasks(study: Path, runs: int, *, steps: int, size: int, checkpoint_every: int) -> list[Task]:
    """The runs of a study, created where they are missing."""
    made = []
    for seed in range(runs):
        config = Walk(seed=seed, steps=steps, size=size, checkpoint_every=checkpoint_every)
        run = Run.create(study, vars(config), label=f"seed {seed}", steps=steps)
        made.append(
            Task(
                folder=run.folder.resolve(),
                work=walk,
                argument=config,
                steps=steps,
                label=f"seed {seed}",
            )
        )
    return made


def sweep_here(study: Path, arguments: Sequence[str]) -> None:
    """A sweep in this process and thread, one run after the other, with the bits of any other."""
    options = _options([str(study), *arguments])
    with threadpool_limits(1):
        counts = sweep(_tasks(options), lambda calls: InlinePool(), SweepProgress())
    assert set(counts) <= {EARLIER, "finished"}, counts


def main(argv: list[str]) -> None:
    """A sweep of walks in a process of its own, which a test may kill."""
    options = _options(argv)
    execution = ExecutorConfig(
        executor=options.executor,
        address=options.address,
        runs_in_parallel=options.runs_in_parallel,
    )
    open_it = functools.partial(open_pool, execution, device="cpu", threads=1)
    print(sweep(_tasks(options), open_it, SweepProgress()))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--executor", default="local")
    parser.add_argument("--address")
    parser.add_argument("--runs-in-parallel", type=int)
    return parser.parse_args(argv)


def _tasks(options: argparse.Namespace) -> list[Task]:
    return tasks(
        options.study,
        options.runs,
        steps=options.steps,
        size=options.size,
        checkpoint_every=options.checkpoint_every,
    )


if __name__ == "__main__":
    # Under this module's name, by which workers find `walk`; not as __main__.
    from run_store.tests.executors import toy_runs

    sys.exit(run_command(toy_runs.main))
