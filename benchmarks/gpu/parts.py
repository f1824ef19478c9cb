"""A part of the benchmark: its sizes, what it found, and the process that it runs in."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import run_store


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where to run, and how large; the defaults are for a GPU."""

    device: torch.device
    model: str = "openelm-270m"
    large_model: str = "openelm-3b"
    vocab_size: int = 32005
    tiny_vocab: int = 2000
    head_tokens: int = 8128
    head_width: int = 1280
    batch_size: int | None = None
    context: int | None = None
    warm_up: int = 10
    steps: int = 30
    dictionary_steps: int = 3
    matrix: int = 8192
    problems: int = 4096
    active: int = 2000
    width: int = 2048
    epochs: int = 24
    images: int = 50_000
    image_batch: int = 512
    image_width: int = 64
    workers: int = 14
    cifar10: str = ""
    counts: str = ""


DRY = Settings(
    device=torch.device("cpu"),
    model="openelm-tiny",
    large_model="openelm-tiny",
    vocab_size=500,
    tiny_vocab=300,
    head_tokens=1200,
    head_width=16,
    batch_size=4,
    context=16,
    warm_up=2,
    steps=3,
    matrix=128,
    problems=8,
    active=40,
    width=64,
    epochs=1,
    images=200,
    image_batch=100,
    image_width=1,
    workers=2,
)


class Record:
    """One part of results.json: its figures and checks, on disk as soon as they are known."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._results = path, json.loads(path.read_text())
        blank: dict[str, Any] = {"status": "running", "figures": {}, "checks": {}}
        self.part = self._results["parts"].setdefault(name, blank)

    def figure(self, name: str, value: Any) -> None:
        """A number, a text, or a list of step times in milliseconds."""
        if isinstance(value, list):
            spread = statistics.stdev(value) if len(value) > 1 else None
            value = {"n": len(value), "mean_ms": statistics.mean(value), "std_ms": spread}
        self.part["figures"][name] = value
        write(self._path, self._results)

    def check(self, name: str, found: float, limit: float) -> None:
        """A figure that must be at most its limit; NaN is not."""
        found, held = float(found), bool(found <= limit)
        self.part["checks"][name] = {"found": found, "limit": float(limit), "held": held}
        write(self._path, self._results)

    def end(self, **fields: Any) -> None:
        """How it ended: its status (ok, failed, out of time, skipped), error and seconds."""
        self.part |= fields
        write(self._path, self._results)


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Replace results.json, whole or not at all."""
    run_store.write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())


def work(module: str, name: str, settings: Settings, path: Path) -> None:
    """The function `name` of `module`, in a process and a session of its own."""
    os.setsid()
    if settings.device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    record = Record(path, name)
    try:
        getattr(importlib.import_module(module), name)(settings, record)
    except Exception as error:  # whatever it is, the other parts go on
        lines = str(error).strip().splitlines()
        record.end(status="failed", error=f"{type(error).__name__}: {lines[0] if lines else ''}")
        raise
    record.end(status="ok")


def attempt(module: str, name: str, settings: Settings, limit: float, path: Path) -> dict[str, Any]:
    """Do a part within its time. Returns what it wrote to results.json, and how it ended.

    Whatever it started ends with it, and when this is interrupted: a DataLoader's workers would
    live on and hold stdout, so that a pipe behind it never ended.
    """
    begin = time.perf_counter()
    process = multiprocessing.get_context("forkserver").Process(
        target=work, args=(module, name, settings, path)
    )
    process.start()
    try:
        process.join(limit)
        late = process.is_alive()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not have come to its session
        process.join()
    record = Record(path, name)
    if late:
        record.end(status="out of time", error=f"stopped after {limit:.0f} s")
    elif record.part["status"] == "running":
        record.end(status="failed", error=f"its process died (exit code {process.exitcode})")
    record.end(seconds=round(time.perf_counter() - begin, 1))
    return record.part


@contextlib.contextmanager
def temporary_attempt(config: Mapping[str, Any]) -> Iterator[run_store.Attempt]:
    """An attempt at a run that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_store.Run.create(Path(folder), config)
        with run_store.attempt(run) as mine:
            yield mine
