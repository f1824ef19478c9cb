"""What a process does when it is asked to end: one line, at once where nothing can be lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class Terminated(BaseException):
    """This process was sent SIGTERM, or SIGHUP as an ssh session ended."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@contextlib.contextmanager
def terminated_by_signal() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise Terminated, once, in the main thread; nohup stays in force."""
    numbers = (signal.SIGTERM, signal.SIGHUP)

    def handle(number: int, _: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                    stack.callback(signal.signal, number, before)
                    signal.signal(number, handle)
        yield


def interruptible(call: Callable[[], T]) -> T:
    """What `call` returns. It is made in a thread, so that a signal is heard meanwhile.

    For calls that leave Python for seconds; one that is interrupted goes on until the process ends.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result()


def end_at_once(*_: Any) -> None:
    """What SIGINT does while modules are imported."""
    os.write(2, b"interrupted\n")
    os._exit(130)


# `python -m` has this in place of the program's name while it imports the program's package.
# `run_command` hears of Ctrl-C itself.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
