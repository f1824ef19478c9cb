"""The clock of a training run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator


class Clock:
    """Time spent training, evaluation left out."""

    def __init__(self, samples_per_step: int, first_step: int) -> None:
        self._samples_per_step, self._first_step = samples_per_step, first_step
        self._start, self._pauses = time.perf_counter(), 0.0

    def per_second(self, step: int) -> float:
        """Samples (tokens, images) of the steps since the start over their time; NaN without."""
        if step == self._first_step:
            return math.nan
        seconds = time.perf_counter() - self._start - self._pauses
        return (step - self._first_step) * self._samples_per_step / max(seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time does not count."""
        begin = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - begin
