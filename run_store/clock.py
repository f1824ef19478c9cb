"""The clock of a training run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

# A checkpoint is written when one as dear as the last would take at most this share of the time.
_CHECKPOINT_SHARE = 0.02


class Clock:
    """Time spent training, evaluation and checkpoints left out."""

    def __init__(self, samples_per_step: int, first_step: int) -> None:
        self._samples_per_step, self._first_step = samples_per_step, first_step
        self._start = self._last_checkpoint = time.perf_counter()
        self._pauses = self._checkpoint_cost = 0.0

    def per_second(self, step: int) -> float:
        """Samples (tokens, images) of the steps since the start, over the time that they took."""
        seconds = time.perf_counter() - self._start - self._pauses
        return (step - self._first_step) * self._samples_per_step / max(seconds, 1e-9)

    def checkpoint_is_due(self) -> bool:
        """Whether enough time has passed since the last checkpoint for what one costs."""
        elapsed = time.perf_counter() - self._last_checkpoint
        return self._checkpoint_cost <= _CHECKPOINT_SHARE * elapsed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time does not count."""
        begin = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - begin

    @contextlib.contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Context in which a checkpoint is written."""
        begin = time.perf_counter()
        with self.paused():
            yield
        self._last_checkpoint = time.perf_counter()
        self._checkpoint_cost = self._last_checkpoint - begin
