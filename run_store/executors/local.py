"""Child processes of this machine, each with its share of the GPUs."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from run_store.attempts import TERMINATED
from run_store.executors.pools import RETRIES, WorkerDied


class LocalPool:
    """`width` children that do one call after another, so that imports are paid for once.

    A call whose child dies is given to a new one, RETRIES times. `gpu_sets` are values of
    CUDA_VISIBLE_DEVICES, which the children take in turn; without any they see what we see.
    """

    def __init__(self, width: int, gpu_sets: Sequence[str] = ()) -> None:
        self.width, self._gpu_sets = width, gpu_sets
        self._calls: queue.SimpleQueue[tuple[Future[Any], Any] | None] = queue.SimpleQueue()
        self._children: dict[int, _Child] = {}
        self._closing = False
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), daemon=True)
            for number in range(width)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """Call a function of a module in a child."""
        future: Future[Any] = Future()
        self._calls.put((future, (function, arguments)))
        return future

    def interrupt(self) -> None:
        """Ask the children to stop what they do."""
        self._closing = True
        for child in list(self._children.values()):
            child.process.terminate()

    def close(self) -> None:
        """End the children: those at rest by themselves, or by force where one is at work."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(0 if self._closing else 1)
        if any(thread.is_alive() for thread in self._threads):
            self.interrupt()
        else:
            # A child that ends by itself cleans up behind libraries: compilers, semaphores.
            for child in self._children.values():
                child.connection.close()
        for child in self._children.values():
            child.process.join(1 if self._closing else 5)
            child.kill()
        for thread in self._threads:
            thread.join()

    def _serve(self, number: int) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if self._closing:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._call(number, call))
            except BaseException as error:
                future.set_exception(error)

    def _call(self, number: int, call: Any) -> Any:
        for _ in range(1 + RETRIES):
            child = self._child(number)
            try:
                child.connection.send(call)
                value, error = child.connection.recv()
            except (EOFError, OSError):
                child.process.join()
                if self._closing:
                    break
                continue
            if error is not None:
                raise error
            return value
        raise WorkerDied(f"its process died (exit code {child.process.exitcode})")

    def _child(self, number: int) -> _Child:
        child = self._children.get(number)
        if child is None or not child.process.is_alive():
            sets = self._gpu_sets
            child = _Child(sets[number % len(sets)] if sets else None)
            self._children[number] = child
        return child


class _Child:
    def __init__(self, gpus: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve_calls, args=(theirs, gpus), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        """End it, if it has not ended, and what it has left: a compiler that was interrupted."""
        assert self.process.ident is not None
        with contextlib.suppress(ProcessLookupError):  # nothing is left, or it has no session yet
            os.killpg(self.process.ident, signal.SIGKILL)
        self.process.kill()


def _serve_calls(connection: Connection, gpus: str | None) -> None:
    """The child: makes the calls that come, until it is told to end or its parent dies."""
    os.setsid()  # Ctrl-C and the end of a terminal reach the parent, which stops us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    while not TERMINATED.is_set():
        try:
            function, arguments = connection.recv()
        except EOFError:
            _leave()
        answer: tuple[Any, Exception | None]
        try:
            answer = (function(*arguments), None)
        except Exception as error:
            answer = (None, error)
        with contextlib.suppress(OSError):
            connection.send(answer)
    _leave()


def _leave() -> NoReturn:
    """End this process: with what libraries clean up, but without taking them apart, for speed."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(os.getpid(), signal.SIGKILL)
