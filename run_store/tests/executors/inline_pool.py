"""A pool for tests of what a sweep does, not of where."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from run_store.executors import sweep_by


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


def use_inline_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the sweeps that an executor would do be done in this process."""
    module = sys.modules[sweep_by.__module__]  # whose name the package gives to a function
    monkeypatch.setattr(module, "open_pool", lambda *_, **__: InlinePool())
