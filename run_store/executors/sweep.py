"""A sweep: every run of a list is done once, wherever its executor finds room."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from run_store.executors.opening import open_pool
from run_store.executors.pools import (
    GRACE_SECONDS,
    SHORT_GRACE_SECONDS,
    ExecutorConfig,
    Pool,
    WorkerDied,
)
from run_store.executors.progress import SweepProgress
from run_store.executors.tasks import Outcome, Task, do
from run_store.leases import Watch, ask_to_stop, has_advanced, newest_attempt, read_lease
from run_store.runs import Run
from run_store.signals import Terminated, terminated_by_signal

EARLIER = "finished earlier"
_POLL_SECONDS = 0.5


def sweep(
    tasks: Sequence[Task],
    open_pool: Callable[[int], Pool],
    progress: SweepProgress,
) -> dict[str, int]:
    """Do what is missing of the runs; returns how many ended in each status.

    `open_pool` gets the number of runs to do. Runs that are finished or known to diverge are
    skipped. A run that another sweep has at work is waited for, and taken over if its process
    dies. One that fails does not stop the others.

    Raises:
        ValueError, OSError: what would be wrong for every run (a full disk), or the one thing that
            was wrong with all of them.
        SystemExit: with code 143 after SIGTERM, 129 after SIGHUP; the runs at work have written a
            checkpoint.
    """
    tasks = list({task.folder: task for task in tasks}.values())
    pending = [task for task in tasks if not Run(task.folder).is_done()]
    counts = Counter({EARLIER: len(tasks) - len(pending)})
    progress.start(pending, done=counts[EARLIER])
    if not pending:
        return dict(counts)
    ends: list[Outcome] = []
    try:
        with terminated_by_signal(), contextlib.closing(open_pool(len(pending))) as pool:
            for task, outcome in _outcomes(pending, pool, progress):
                ends.append(outcome)
                progress.ended(task, outcome)
                if outcome.stops_all:
                    raise ValueError(outcome.error)
    except Terminated as asked:
        with contextlib.suppress(OSError):  # a terminal that has gone
            progress.say("stopped: the same command goes on from the checkpoints")
        raise SystemExit(asked.exit_code) from None
    if ends[0].is_users and len({(end.status, end.error) for end in ends}) == 1:
        raise ValueError(ends[0].error)
    counts.update(end.status for end in ends)
    return dict(counts)


def sweep_by(
    execution: ExecutorConfig, tasks: Sequence[Task], *, device: str, threads: int
) -> dict[str, int]:
    """`sweep` by an executor, showing its progress; each run has `threads` CPU threads."""
    open_it = functools.partial(open_pool, execution, device=device, threads=threads)
    with contextlib.closing(SweepProgress()) as progress:
        return sweep(tasks, open_it, progress)


def _outcomes(
    pending: Sequence[Task], pool: Pool, progress: SweepProgress
) -> Iterator[tuple[Task, Outcome]]:
    """Of every run; the runs at work are stopped when an exception ends this."""
    engine = _Engine(pending, pool, progress)
    try:
        yield from engine.outcomes()
    except BaseException:
        engine.stop()
        raise


class _Engine:
    def __init__(self, pending: Sequence[Task], pool: Pool, progress: SweepProgress) -> None:
        self._queue = deque((task, 0) for task in pending)
        self._pool, self._progress = pool, progress
        self._busy: dict[Future[Any], Task] = {}
        self._elsewhere: list[Task] = []
        self._watch = Watch()

    def outcomes(self) -> Iterator[tuple[Task, Outcome]]:
        """Hand out the runs, and yield each with its outcome as it ends."""
        looked = 0.0
        while self._queue or self._busy or self._elsewhere:
            while self._queue and len(self._busy) < self._pool.width:
                task, dead = self._queue.popleft()
                self._busy[self._pool.submit(do, task, dead)] = task
            done = self._wait()
            for future in done:
                task, outcome = self._busy.pop(future), _result(future)
                if outcome.status == "waiting":  # its machine is going down: elsewhere, then
                    self._queue.append((task, 0))
                elif outcome.status == "in use":
                    self._elsewhere.append(task)
                else:
                    yield task, outcome
            if not done or time.monotonic() - looked > _POLL_SECONDS:
                looked = time.monotonic()
                self._look_elsewhere()
                self._progress.show(self._leases())

    def stop(self) -> None:
        """Have the runs at work write a checkpoint and stop, as far as the time of grace goes."""
        at_work = {}
        for future, task in self._busy.items():
            newest = newest_attempt(task.folder / "attempts")
            if newest is not None and read_lease(newest).get("status") == "running":
                ask_to_stop(newest)
                at_work[future] = newest
        self._pool.interrupt()
        # Not for calls that a cluster has only queued, and not long where there is nothing to keep:
        # a compiler may be at work on the first step.
        wait(at_work, SHORT_GRACE_SECONDS)
        worked = [future for future in at_work if has_advanced(read_lease(at_work[future]))]
        wait(worked, GRACE_SECONDS - SHORT_GRACE_SECONDS)

    def _wait(self) -> set[Future[Any]]:
        if not self._busy:
            time.sleep(_POLL_SECONDS)  # others have all that is left
            return set()
        return wait(list(self._busy), _POLL_SECONDS, FIRST_COMPLETED).done

    def _look_elsewhere(self) -> None:
        """Queue the runs that others had: a call of `do` tells those that were done from dead."""
        for task in list(self._elsewhere):
            newest = newest_attempt(task.folder / "attempts")
            if newest is None or self._watch.is_held(newest) is False:
                self._elsewhere.remove(task)
                self._queue.append((task, 0 if newest is None else int(newest.name)))

    def _leases(self) -> dict[Task, dict[str, Any]]:
        leases = {}
        for task in [*self._busy.values(), *self._elsewhere]:
            if (newest := newest_attempt(task.folder / "attempts")) is not None:
                lease = read_lease(newest)
                if lease.get("status") == "running":
                    leases[task] = lease
        return leases


def _result(future: Future[Any]) -> Outcome:
    try:
        outcome = future.result()
        assert isinstance(outcome, Outcome)
        return outcome
    except WorkerDied as error:
        return Outcome(status="lost", error=str(error))
