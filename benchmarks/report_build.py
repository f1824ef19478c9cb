"""Time and memory of `python -m reports build` against the number of runs of a synthetic study.

    python benchmarks/report_build.py --runs 25 50 100 175 --grow models

Every run is as large as one of the paper's: 32,005 classes, 100 recorded steps. A run's losses are
those of one weight decay; seeds and models share them, since only reading them is timed. A study
grows by seeds (more runs behind each point) or by models of 25 runs each (more panels too).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from run_store import Run, class_record, publish, run_id, write_atomically

VOCAB_SIZE, STEPS = 32_005, 100
WEIGHT_DECAYS = (0.0, 0.1, 0.3, 0.5, 1.0)
SEEDS = 5


def publish_first(run: Run, weight_decay: float) -> None:
    """A record of full size: a Zipf vocabulary, windows in which rare classes are often absent."""
    generator = np.random.default_rng(int(10 * weight_decay))
    rank = np.arange(1, VOCAB_SIZE + 1)
    counts = np.maximum(1, 180_000 / rank**1.05).astype(np.int64)
    share = np.minimum(1, np.sqrt((0.1 + 20 * weight_decay) / counts))
    final = -np.log1p(-(1 - 1 / VOCAB_SIZE) * share)
    time_left = np.exp(-np.arange(STEPS) / 15)[:, None]
    count = generator.poisson(counts / 4, size=(STEPS, VOCAB_SIZE))
    loss = final + (10.4 - final) * time_left * generator.uniform(0.8, 1.2, count.shape)
    loss = np.where(count > 0, loss, np.nan)
    accuracy = np.where(count > 0, generator.binomial(count, np.exp(-final)), np.nan)
    accuracy = accuracy / np.maximum(count, 1)
    record = class_record(
        steps=100 * np.arange(1, STEPS + 1),
        class_counts=counts,
        labels=[f"Ġtoken{k}" for k in range(VOCAB_SIZE)],
        count=count,
        loss=loss,
        accuracy=accuracy,
        final_count=counts,
        final_loss=final,
        final_accuracy=np.exp(-final),
    )
    publish(run, record)


def grow(study: Path, number: int, by: str) -> None:
    """Bring a study to `number` finished runs; all of one weight decay share their record."""
    for place in range(number):
        row, column = divmod(place, len(WEIGHT_DECAYS))
        model, seed = divmod(row, SEEDS) if by == "models" else (0, row)
        config = {
            "model": f"model-{model}",
            "corpus": "synthetic",
            "weight_decay": WEIGHT_DECAYS[column],
            "seed": seed,
            "steps": 100 * STEPS,
            "vocab_size": VOCAB_SIZE,
        }
        run = Run.create(study, config)
        if run.status == "finished":
            continue
        if row == 0:
            publish_first(run, WEIGHT_DECAYS[column])
            continue
        first = study / run_id(config | {"model": "model-0", "seed": 0})
        shutil.copyfile(first / "classes.nc", run.folder / "classes.nc")
        published = json.loads((first / "manifest.json").read_bytes())
        told = {name: published[name] for name in ("status", "classes_sha256")}
        manifest = json.dumps(run.stored_manifest | told)
        write_atomically(run.folder / "manifest.json", manifest.encode())


def measure(study: Path) -> tuple[float, float, float]:
    """Seconds, peak memory of the process and its children in GiB, and the page's size in MB."""
    command = [sys.executable, "-m", "reports", "build", str(study)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"build exited with {process.returncode}")
    return seconds, peak, (study / "report.html").stat().st_size / 1e6


def tree_memory(pid: int) -> float:
    """Proportional memory (shared pages counted once) of a process and its children, in GiB."""
    total = 0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = int(line.split()[1])
    except OSError:
        return 0.0
    return total / 2**20 + sum(tree_memory(int(child)) for child in children)


def main() -> None:
    """Print one table row a study size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, nargs="+", default=[25, 50, 100, 175])
    parser.add_argument("--grow", choices=["seeds", "models"], default="models")
    parser.add_argument("--folder", type=Path, default=None, help="where the study goes")
    options = parser.parse_args()
    print(f"cores: {os.cpu_count()}")
    print("| runs | seconds | peak GiB | page MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        study = Path(scratch) / "study"
        for number in sorted(options.runs):
            grow(study, number, options.grow)
            seconds, peak, size = measure(study)
            print(f"| {number} | {seconds:.1f} | {peak:.2f} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
