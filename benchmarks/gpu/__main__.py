"""What one GPU does: is it right, how fast, in how much memory. At most ten minutes.

    benchmarks/gpu.sh [FOLDER] [--cifar10 FOLDER] [--counts FILE]
    benchmarks/gpu.sh FOLDER --dry-run                   # tiny, on a CPU: tests these files

Needs the project's dependencies (h5py, h5netcdf and tyro are those that machines set up for torch
alone tend to lack) and no network. Every part runs in a process of its own with a time limit;
one that fails, runs out of memory or of time is recorded as such, with what it had measured, and
the others go on. FOLDER/results.json holds each figure as soon as it is known; parts of an earlier
call stay in it until they are asked for again. Exit code 0: every check held and every part ended.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.parts import DRY, Record, Settings, attempt, write
from run_store.command_line import run_command

# In this order: the module of each, and the seconds that it may take. More than fit the minutes of
# them all, so that --parts gives a part that was cut short its whole time.
PARTS = {
    "checks_of_the_parts": ("checks", 60),
    "checks_of_training": ("checks", 90),
    "checks_of_ufm": ("theory", 60),
    "rates": ("language", 40),
    "compiled_bf16": ("language", 180),
    "eager": ("language", 90),
    "checkpoints": ("language", 90),
    "peer": ("language", 60),
    "large": ("language", 90),
    "ufm_batch": ("theory", 60),
    "vision": ("images", 240),
    "compiled_fp16": ("language", 120),
    "ufm_vocabulary": ("theory", 400),
}

# Imported once for all parts, which are forked from the process that does; main needs none of it.
PRELOAD = ["benchmarks.gpu.checks", "benchmarks.gpu.theory", "llm_experiments.models.openelm"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("gpu-results"))
    parser.add_argument("--cifar10", default="", help="folder of CIFAR-10; without, random images")
    parser.add_argument("--counts", default="", help="counts of a vocabulary; without, Zipf's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=9.5, help="of all parts together")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    options = parser.parse_args(arguments)
    settings = DRY if options.dry_run else Settings(device=torch.device("cuda"))
    settings = replace(settings, cifar10=options.cifar10, counts=options.counts)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.dry_run:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    deadline = time.monotonic() + 60 * options.minutes
    results = circumstances(settings)
    if results["gpu"] is None and not options.dry_run:
        raise ValueError("this machine has no usable GPU; expected one, or --dry-run")
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "results.json"
    write(path, results | {"parts": kept(path, results, options.parts)})
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    for name in options.parts:
        module, seconds = PARTS[name]
        limit = min(seconds, deadline - time.monotonic())
        if limit > 5:
            part = attempt(f"benchmarks.gpu.{module}", name, settings, limit, path)
            print(f"{name}: {part['status']} after {part['seconds']} s", flush=True)
        else:
            Record(path, name).end(status="skipped", error="no time left", seconds=0.0)
    results = json.loads(path.read_text())
    print()
    print(", ".join(f"{key} {results[key]}" for key in ("gpu", "torch", "cuda", "python", "date")))
    for name, part in results["parts"].items():
        print("\n".join(lines_of(name, part)))
    print(f"figures: {path}")
    parts = results["parts"].values()
    held = all(check["held"] for part in parts for check in part["checks"].values())
    return 0 if held and all(part["status"] == "ok" for part in parts) else 1


def kept(path: Path, now: Mapping[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    """The parts of an earlier call that are not asked for again.

    Raises ValueError where they were measured on something else: a table tells of one machine.
    """
    before = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    for name in ("gpu", "torch", "cuda", "transformers", "numpy", "python", "cores"):
        if (found := before.get(name, now[name])) != now[name]:
            raise ValueError(f"{path}: {name} was {found}; expected {now[name]}, or a new folder")
    return {name: part for name, part in before["parts"].items() if name not in asked}


def circumstances(settings: Settings) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": version("transformers"),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"device": settings.device.type},
    }


def lines_of(name: str, part: dict[str, Any]) -> list[str]:
    """A part as rows of the table."""
    lines = [f"{name}: {part['status']}, {part['seconds']} s"]
    if "error" in part:
        lines.append(f"    {part['error']}")
    for check, result in part["checks"].items():
        verdict = "held" if result["held"] else "BROKEN"
        numbers = f"{result['found']:.2e} (limit {result['limit']:.2e})"
        lines.append(f"    {check:66s} {numbers} {verdict}")
    lines += [f"    {figure:66s} {shown(value)}" for figure, value in part["figures"].items()]
    return lines


def shown(value: Any) -> str:
    """A figure for the reader."""
    if isinstance(value, dict):
        spread = "" if value["std_ms"] is None else f" ± {value['std_ms']:.3f}"
        return f"{value['mean_ms']:.3f}{spread} ms (n = {value['n']})"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # which do not reach the sessions of the parts
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(run_command(main))
