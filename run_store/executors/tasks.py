"""A run as an executor sees it: what to call with what, and how it ended."""

from __future__ import annotations

import contextlib
import errno
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run_store.attempts import TERMINATED, Attempt, Diverged, Stopped, attempt, error_line
from run_store.devices import is_out_of_memory
from run_store.leases import RunInUse
from run_store.runs import Run

# A batch system announces the end of a job with one of these; submitit uses SIGUSR2.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
# What is wrong with the disk or the folder is wrong for every run.
_FOR_ALL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One run of a sweep: small, and picklable by the names of what it refers to."""

    folder: Path
    """of the run, on storage that every worker sees"""
    work: Callable[[Attempt, Any], None]
    """a function of a module; does the run from where it stands, and publishes it"""
    argument: Any
    """what `work` needs to know"""
    steps: int
    label: str
    """the run in a few words"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `do` ended; all that was computed is in the run's folder."""

    status: str
    """finished, finished elsewhere, diverged, failed, waiting (it was stopped) or in use"""
    error: str = ""
    is_users: bool = False
    """whether the error is one of input or disk, and no bug"""
    stops_all: bool = False
    """whether it would be the same for every run (a full disk, say)"""
    seconds: float = 0.0
    """spent in `work`"""


def do(task: Task, dead: int = 0) -> Outcome:
    """Do a run in this process, or find that another one does; never raises for what went wrong.

    `dead` is the number of an attempt whose holder was seen to be dead.
    """
    begin = time.perf_counter()
    try:
        with _stop_on_signals() as begun, attempt(Run(task.folder), dead=dead) as mine:
            if mine.run.is_done():  # by another sweep, or a crash had cut short its publication
                return Outcome(status="finished elsewhere")
            if mine.run.stored_manifest["status"] == "finished":
                mine.withdraw()
            begin = time.perf_counter()
            begun.append(mine)
            task.work(mine, task.argument)
            return Outcome(status="finished", seconds=time.perf_counter() - begin)
    except (Stopped, _StoppedAtOnce):
        return Outcome(status="waiting", seconds=time.perf_counter() - begin)
    except RunInUse as error:
        return Outcome(status="in use", error=error_line(error))
    except Diverged as error:
        seconds = time.perf_counter() - begin
        return Outcome(status="diverged", error=error_line(error), seconds=seconds)
    except Exception as error:
        is_users = isinstance(error, OSError | ValueError) or is_out_of_memory(error)
        if not is_users:
            traceback.print_exc()
        return Outcome(
            status="failed",
            error=error_line(error),
            is_users=is_users,
            stops_all=isinstance(error, OSError) and error.errno in _FOR_ALL,
            seconds=time.perf_counter() - begin,
        )


class _StoppedAtOnce(BaseException):
    """The process was asked to end before the attempt came to its first step.

    No Exception, as what is interrupted (imports, compilers) may catch those.
    """


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[list[Attempt]]:
    """Have attempts stop, with a checkpoint, when this process is asked to end.

    The one in the list that is yielded stops at once as long as it has come no step further.
    """
    TERMINATED.clear()
    begun: list[Attempt] = []
    if threading.current_thread() is not threading.main_thread():
        yield begun  # only the main thread may set handlers
        return

    def handle(*_: Any) -> None:
        TERMINATED.set()
        if begun and not begun.pop().lease.has_advanced:
            raise _StoppedAtOnce

    before = [signal.signal(number, handle) for number in _STOP_SIGNALS]
    try:
        yield begun
    finally:
        begun.clear()
        for number, handler in zip(_STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)
