"""A part of the benchmark: its sizes, what it found, and the process that it runs in."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    dictionary_steps=1,
    matrix=128,
    problems=8,
    active=40,
    width=64,
    epochs=1,
    images=200,
    image_batch=100,
    image_width=1,
    workers=0,
)


class Record:
    """A part's figures and checks, on disk as soon as they are known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = {"status": "running", "figures": {}, "checks": {}}

    def figure(self, name: str, value: Any) -> None:
        """A number, a text, or a list of step times in milliseconds."""
        if isinstance(value, list):
            spread = statistics.stdev(value) if len(value) > 1 else None
            value = {"n": len(value), "mean_ms": statistics.mean(value), "std_ms": spread}
        self._content["figures"][name] = value
        self._write()

    def check(self, name: str, found: float, limit: float) -> None:
        """A figure that must be at most its limit; NaN is not."""
        found, held = float(found), bool(found <= limit)
        self._content["checks"][name] = {"found": found, "limit": float(limit), "held": held}
        self._write()

    def end(self, status: str, **fields: Any) -> None:
        """ok, failed or skipped."""
        self._content |= {"status": status} | fields
        self._write()

    def _write(self) -> None:
        run_store.write_atomically(self._path, json.dumps(self._content, indent=1).encode())


def work(module: str, name: str, settings: Settings, path: Path) -> None:
    """The part `name` of `benchmarks.gpu`'s `module`, in a process of its own."""
    if settings.device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    record = Record(path)
    try:
        getattr(importlib.import_module(module), name)(settings, record)
    except Exception as error:  # whatever it is, the other parts go on
        lines = str(error).strip().splitlines()
        record.end("failed", error=f"{type(error).__name__}: {lines[0] if lines else ''}")
        raise
    record.end("ok")


def attempt(module: str, name: str, settings: Settings, limit: float) -> dict[str, Any]:
    """What a part measured within its time, and how it ended."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        process = multiprocessing.get_context("forkserver").Process(
            target=work, args=(module, name, settings, path)
        )
        process.start()
        process.join(limit)
        outcome: dict[str, Any] = {}
        if process.is_alive():
            process.kill()
            process.join()
            outcome = {"status": "out of time", "error": f"stopped after {limit:.0f} s"}
        found = json.loads(path.read_text()) if path.exists() else {"figures": {}, "checks": {}}
    if not outcome and found.get("status") not in ("ok", "failed"):
        error = f"its process died (exit code {process.exitcode})"
        outcome = {"status": "failed", "error": error}
    return found | outcome | {"seconds": round(time.perf_counter() - begin, 1)}


@contextmanager
def temporary_attempt(config: Mapping[str, Any]) -> Iterator[run_store.Attempt]:
    """An attempt at a run that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_store.Run.create(Path(folder), config)
        with run_store.attempt(run) as mine:
            yield mine
