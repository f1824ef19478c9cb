"""Checkpoints while a run goes on: its state is copied at once, and a thread writes the copy."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from run_store.attempts import Attempt
from run_store.checkpoints import keep, remove

# What a kill may cost: seconds of work, or a share of the run where that is more.
MOST_LOST_SECONDS = float(os.environ.get("FREQUENCY_BINS_MOST_LOST", "60"))
_MOST_LOST_SHARE = 0.02
# What they may cost: this share of the time, while training stands still for a copy.
_TIME_SHARE = 0.02
_FIRST_GUESS_SECONDS = 0.2


class CheckpointWriter:
    """The checkpoints of an attempt at a run of `steps`, from the one it goes on from, at `step`.

    A context that ends when the file that is being written is whole. What a kill loses is what
    came after the last whole one, so the time that writing takes is part of it: one is begun early
    enough for a file that takes twice as long as the last. Where writing, too, is a small share of
    the time, they come more often. One is written at a time; where that takes longer than a third
    of what may be lost, one follows the other.

    Args:
        copy: returns the state now, as `snapshot` copies it. (In a group of processes every one
            makes it at the same step, and only the first, which has the `attempt`, writes it.)
    """

    def __init__(
        self, attempt: Attempt | None, step: int, steps: int, copy: Callable[[], dict[str, Any]]
    ) -> None:
        self.step = self._first = step
        self._attempt, self._steps, self._copy = attempt, steps, copy
        self._begin = self._taken = time.monotonic()
        self.seconds = _FIRST_GUESS_SECONDS
        """that the last one took until it was whole"""
        self.copy_seconds = 0.0
        """for which the last one held up training"""
        self._discarded = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):  # the error that ends this context is the first
            self.wait()

    @property
    def folder(self) -> Path:
        """Where they are written."""
        assert self._attempt is not None
        return self._attempt.folder

    @property
    def writing(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def is_due(self, step: int) -> bool:
        """Whether it is time to take one; to be asked after every step. Raises as `wait`."""
        if self.writing:
            return False
        self.wait()
        now, seconds = time.monotonic(), self.seconds
        seconds_per_step = (now - self._begin) / max(1, step - self._first)
        if seconds_per_step * (self._steps - step) < seconds:
            return False  # the one after the last step comes as soon
        most_lost = max(MOST_LOST_SECONDS, _MOST_LOST_SHARE * seconds_per_step * self._steps)
        wanted = min(seconds / _TIME_SHARE, MOST_LOST_SECONDS - 2 * seconds)
        affordable = max(wanted, self.copy_seconds / _TIME_SHARE)
        return now - self._taken >= max(seconds, min(affordable, most_lost - 2 * seconds))

    def take(self, step: int) -> None:
        """Copy the state after `step` and begin to write it, unless there is one of that step.

        Waits for the one before. Raises as `wait`.
        """
        self.wait()
        if step == self.step:
            return
        self.step, self._taken = step, time.monotonic()
        state = self._copy()
        self.copy_seconds = time.monotonic() - self._taken
        if self._attempt is not None:
            copied = None
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                copied.record()
            write = (self._attempt, step, state, copied)
            self._thread = threading.Thread(target=self._write, args=write, daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint is whole. OSError where it cannot be written (a full disk, say)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and not self._discarded.is_set():
            error, self._error = self._error, None
            raise error

    def discard(self) -> None:
        """The run is published: end what is being written, and remove what was."""
        self._discarded.set()
        self.wait()
        if self._attempt is not None:
            remove(self._attempt.folder)

    def _write(self, attempt: Attempt, step: int, state: dict[str, Any], copied: Any) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            keep(attempt, step, state, self._discarded)
            self.seconds = time.monotonic() - self._taken
        except BaseException as error:
            self._error = error


def snapshot(state: Any, whole: Callable[[Tensor], Tensor | None] = lambda tensor: tensor) -> Any:
    """A copy of a state_dict on the host, which stays as it is while training goes on.

    Nothing waits for a GPU: its copies go into pinned memory, in line with its other work, and are
    there when an event recorded now has passed. Tensors that share their memory are copied once.
    `whole` is asked for each tensor in place of a shard; None leaves it out.
    """
    copies: dict[Any, Tensor | None] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: copy(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(copy, value))
        if not isinstance(value, Tensor):
            return value
        key: Any = id(value)
        if type(value) is Tensor and value.numel():
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in copies:
            tensor = whole(value)
            copies[key] = None if tensor is None else _on_host(tensor.detach())
        return copies[key]

    return copy(state)


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
