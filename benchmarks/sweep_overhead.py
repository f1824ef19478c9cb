"""What a sweep costs beside its runs: start-up, leases, publication, hand-over.

    python -m benchmarks.sweep_overhead --executors local ray slurm --runs 50 500

A run does `--seconds` of arithmetic, leaves a record like any other and is handed out, leased and
published as any other. The overhead is the time of the whole sweep, from the start of its process
to its end, over the time that the runs' own work takes on as many cores. Slurm is stood in for by
commands that begin a job at once (run_store/tests/executors/slurm_standins.py): what its queue adds
is not in it.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from run_store import Attempt, Run, class_record
from run_store.executors import ExecutorConfig, SweepProgress, Task, open_pool, sweep
from run_store.tests.executors.slurm_standins import stand_in

CLASSES = 1000
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run of this benchmark."""

    seed: int
    seconds: float


def work(attempt: Attempt, config: Work) -> None:
    """Multiply matrices for as long as the run should take, then publish a record."""
    begin = time.perf_counter()
    generator = np.random.default_rng(config.seed)
    matrix = generator.standard_normal((64, 64))
    while time.perf_counter() - begin < config.seconds:
        matrix = np.tanh(matrix @ matrix)
    attempt.append_scalars({"step": 1, "loss": 1.0})
    loss = generator.random((1, CLASSES))
    ones = np.ones(CLASSES, dtype=np.int64)
    record = class_record(
        steps=[1],
        class_counts=ones,
        labels=[str(number) for number in range(CLASSES)],
        count=ones[None],
        loss=loss,
        accuracy=loss,
        final_count=ones,
        final_loss=loss[0],
        final_accuracy=loss[0],
    )
    attempt.publish(record)


def run_sweep(study: Path, executor: str, runs: int, seconds: float) -> None:
    """One sweep, in this process."""
    tasks = []
    for seed in range(runs):
        config = Work(seed=seed, seconds=seconds)
        run = Run.create(study, vars(config))
        folder = run.folder.resolve()
        tasks.append(Task(folder=folder, work=work, argument=config, steps=1, label=f"seed {seed}"))
    # Nobody queues Slurm's jobs here.
    at_once = len(os.sched_getaffinity(0)) if executor == "slurm" else None
    config = ExecutorConfig(executor=executor, runs_in_parallel=at_once)  # type: ignore[arg-type]
    open_it = functools.partial(open_pool, config, device="cpu", threads=1)
    counts = sweep(tasks, open_it, SweepProgress())
    if counts.get("finished") != runs:
        raise RuntimeError(f"{counts}; expected {runs} finished")


def main() -> None:
    """Print one line a sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executors", nargs="+", default=["local", "ray"])
    parser.add_argument("--runs", nargs="+", type=int, default=[50, 500])
    parser.add_argument("--seconds", type=float, default=1.0, help="of a run's own work")
    parser.add_argument("--one", nargs=2, metavar=("STUDY", "EXECUTOR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_sweep(Path(options.one[0]), options.one[1], options.runs[0], options.seconds)
        return
    cores = len(os.sched_getaffinity(0))
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    print("executor  runs  sweep s  work s  overhead  a run, ms")
    for executor in options.executors:
        for runs in options.runs:
            # A job in Slurm's place may still note its own end when the sweep has ended.
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                command = [sys.executable, "-m", "benchmarks.sweep_overhead"]
                command += ["--one", f"{folder}/study", executor, "--runs", str(runs)]
                command += ["--seconds", str(options.seconds)]
                added = stand_in(Path(folder)) if executor == "slurm" else {}
                # Slurm's files are put into the working folder.
                where = {"cwd": folder, "env": environment | added | {"PYTHONPATH": str(ROOT)}}
                begin = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, **where)
                whole = time.perf_counter() - begin
            own = runs * options.seconds / cores
            each = 1000 * (whole - own) * cores / runs
            share = whole / own - 1
            print(f"{executor:8} {runs:5} {whole:8.1f} {own:7.1f} {share:9.1%} {each:10.0f}")


if __name__ == "__main__":
    from benchmarks import sweep_overhead  # under the name by which workers find `work`

    sweep_overhead.main()
