"""A pool for tests of what a sweep does, not of where."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class InlinePool:
    """Makes a call as it comes, in this process."""

    width = 1

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass
