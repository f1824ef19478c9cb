"""Checkpoints that are whole or not there.

A checkpoint's name holds its step and a hash of its bytes and step, so one that was cut short,
tampered with or renamed is seen at once and the one before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

import torch

from run_store.attempts import Attempt
from run_store.command_line import one_line
from run_store.input_files import open_regular
from run_store.runs import naming
from run_store.saved_state import read_state, restore

_NAME = re.compile(r"checkpoint-(\d{8})-([0-9a-f]{16})\.pt")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after a step: of each part its state_dict, on the CPU."""

    step: int
    state: dict[str, dict[str, Any]]
    path: Path
    """where it was found"""


@runtime_checkable
class Resumable(Protocol):
    """An attempt, as far as one goes on from it."""

    def folders(self) -> Sequence[Path]:
        """Where checkpoints may lie."""

    def resume(self, step: int, source: Path | None = None) -> None:
        """Go on after `step`."""


def keep(
    attempt: Attempt, step: int, state: Mapping[str, Any], stop: threading.Event | None = None
) -> None:
    """Write a checkpoint of an attempt in place of those before it; raises as `save`."""
    save(attempt.folder, step, state, attempt.folders()[1:], stop)


def resume(
    attempt: Resumable,
    parts: Mapping[str, Any],
    own: Callable[[Any, Any], Any] = lambda part, state: state,
) -> int:
    """Load the latest whole checkpoint into `parts` and return the step to go on from: 0 without.

    `own(part, state)` is what this process takes of a part's state. Raises as `restore`.
    """
    checkpoint = load_latest(*attempt.folders())
    if checkpoint is None:
        attempt.resume(0)
        return 0
    state = {name: own(parts.get(name), part) for name, part in checkpoint.state.items()}
    restore(parts, state, checkpoint.path)
    attempt.resume(checkpoint.step, checkpoint.path.parent)
    return checkpoint.step


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    earlier: Sequence[Path] = (),
    stop: threading.Event | None = None,
) -> None:
    """Write the state of every part after a step, then remove the checkpoints before it.

    They are removed from ``earlier`` folders too.

    Raises:
        OSError: the folder cannot be written, or is full, or `stop` was set; nothing is left
            behind.
    """
    beside = folder / f".checkpoint.{secrets.token_hex(4)}.partial"
    older = [e for place in (folder, *earlier) for e in _found(place) if e[0] <= step]
    try:
        with beside.open("wb") as opened:
            file = _HashedFile(opened, stop)
            torch.save(dict(state), cast(BinaryIO, file))  # it needs no more of a file
        path = folder / f"checkpoint-{step:08d}-{_of_step(file.digest, step)}.pt"
        beside.rename(path)
    except OSError as error:
        raise naming(error, folder) from None
    except RuntimeError as error:
        # torch gives an error of its own for a write that failed, with the cause behind it.
        if isinstance(cause := error.__context__, OSError):
            raise naming(cause, folder) from None
        raise
    finally:
        beside.unlink(missing_ok=True)
    for _, _, old in older:
        if old != path:
            old.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove the checkpoints of a folder."""
    for _, _, path in _found(folder):
        path.unlink(missing_ok=True)


class _HashedFile:
    """What torch.save writes to: its bytes are hashed on their way."""

    def __init__(self, file: BinaryIO, stop: threading.Event | None) -> None:
        self._file, self._stop, self.digest = file, stop, hashlib.sha256()

    def write(self, content: bytes | memoryview) -> int:
        if self._stop is not None and self._stop.is_set():
            raise InterruptedError(errno.EINTR, "stopped")
        self.digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def load_latest(*folders: Path) -> Checkpoint | None:
    """The latest checkpoint whose bytes are those that were written; None where there is none.

    The name's hash tells of accidents; `read_state` bears with bytes that mean harm.
    """
    found = [entry for folder in folders for entry in _found(folder)]
    for step, digest, path in sorted(found, reverse=True):
        try:
            if _digest(path, step) == digest:
                return Checkpoint(step=step, state=read_state(path), path=path)
            print(f"ignoring {path}: cut short or changed since it was written", file=sys.stderr)
        except ValueError as error:
            print(f"ignoring {one_line(error)}", file=sys.stderr)
    return None


def _found(folder: Path) -> list[tuple[int, str, Path]]:
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [(int(match[1]), match[2], path) for match, path in matches if match]


def _digest(path: Path, step: int) -> str:
    with open(path, "rb", opener=open_regular) as file:
        return _of_step(hashlib.file_digest(file, "sha256"), step)


def _of_step(digest: hashlib._Hash, step: int) -> str:
    digest.update(str(step).encode("ascii"))
    return digest.hexdigest()[:16]
