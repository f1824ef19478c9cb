"""One writer a run: a lease that ends when its holder says so, dies or falls silent.

    <run>/attempts/0003/lease.json   who holds it, how often it has beaten, where the run stands

The attempt's number is its fencing token: it is taken by a rename that cannot replace what is
there, so it is given once, and a holder that finds a higher number knows that it was replaced.
Nothing here compares two clocks. On the holder's own machine the kernel tells whether it lives (it
frees the holder's flock, however it dies); on another, an observer watches the beat with its own
monotonic clock (`Watch`), so it does not matter what time any machine thinks it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from run_store.input_files import open_regular, parse_json, read_file

BEAT_SECONDS = 2.0
# How long a lease of another machine may be silent before its holder counts as dead. NFS clients
# see each other's writes within seconds; a minute also bears with a server that hangs briefly.
PATIENCE_SECONDS = float(os.environ.get("FREQUENCY_BINS_PATIENCE", "60"))

_NUMBER = re.compile(r"[0-9]{4,9}")
# The file keeps its size and is written in place, which works on a full disk too.
_SIZE = 2048
_LONGEST_ERROR = 1000


class RunInUse(OSError):
    """Another process holds this run."""


class LeaseLost(RunInUse):
    """This process was taken for dead and another one has its run."""


class Lease:
    """The right to write to one attempt, renewed by a thread until `end`.

    `lost` is set when a later attempt has begun, `stop` when someone asked the holder to stop.
    """

    def __init__(self, folder: Path, descriptor: int, state: dict[str, Any]) -> None:
        self.folder, self._descriptor, self._state = folder, descriptor, state
        self.lost, self.stop = threading.Event(), threading.Event()
        self._ending, self._writing = threading.Event(), threading.Lock()
        self._begin, self._first_step = time.monotonic(), 0
        self._thread = threading.Thread(target=self._beat_until_the_end, daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """The attempt's number."""
        return int(self.folder.name)

    def begin_at(self, step: int) -> None:
        """Where this attempt starts, which its speed is measured from."""
        self._begin, self._first_step = time.monotonic(), step
        self._state["first_step"] = self._state["step"] = step

    def advance(self, step: int, rate: float, unit: str) -> None:
        """The run has come to `step`; the next beat says so."""
        self._state |= {"step": step, "rate": rate, "unit": unit}

    @property
    def has_advanced(self) -> bool:
        """Whether a step was done."""
        return has_advanced(self._state)

    def check(self) -> None:
        """Raise LeaseLost if a later attempt has begun."""
        if self._successor().exists():
            self.lost.set()
        if self.lost.is_set():
            raise LeaseLost(f"{self.folder.parent.parent} was taken over by another process")

    def end(self, status: str, error: str = "") -> None:
        """Say how the attempt ended and let go of it."""
        self._ending.set()
        self._thread.join()
        self._state |= {"status": status, "error": error[:_LONGEST_ERROR]}
        with contextlib.suppress(OSError):
            self._write()
            os.fsync(self._descriptor)
        with contextlib.suppress(OSError):
            # Closing is not enough: a forked child may still hold the descriptor.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _beat_until_the_end(self) -> None:
        while not self._ending.wait(BEAT_SECONDS):
            if self._successor().exists():
                self.lost.set()
                return
            if (self.folder / "stop").exists():
                self.stop.set()
            self._state["beat"] += 1
            seconds = time.monotonic() - self._begin
            steps = self._state["step"] - self._first_step
            self._state["steps_per_second"] = steps / seconds if seconds > 0 else 0.0
            with contextlib.suppress(OSError):  # a beat that fails is one that is missed
                self._write()

    def _successor(self) -> Path:
        return self.folder.with_name(f"{self.number + 1:04d}")

    def _write(self) -> None:
        with self._writing:
            os.pwrite(self._descriptor, _padded(self._state), 0)


def acquire(attempts: Path, *, dead: int = 0) -> Lease:
    """The lease of a new attempt in the folder of a run's attempts.

    `dead` is the number of an attempt whose holder the caller has seen to be dead (see `Watch`).

    Raises:
        RunInUse: the newest attempt is held, or may be: its machine is another one.
        ValueError: the folder, or the run's, is a symbolic link: what is written there would land
            elsewhere.
        OSError: the folder cannot be written.
    """
    for folder in (attempts.parent, attempts):
        if folder.is_symlink():
            raise ValueError(f"{folder} is a symbolic link; expected a folder of its own")
    attempts.mkdir(exist_ok=True)
    newest = newest_attempt(attempts)
    number = 1 if newest is None else int(newest.name) + 1
    if newest is not None and number - 1 > dead and is_held(newest) is not False:
        raise RunInUse(f"{attempts.parent} is in use by {holder(read_lease(newest))}")
    token = secrets.token_hex(8)
    beside = attempts / f".{number:04d}.{token}.partial"
    target = attempts / f"{number:04d}"
    state = {
        "status": "running",
        "error": "",
        "beat": 0,
        "step": 0,
        "first_step": 0,
        "steps_per_second": 0.0,
        "rate": 0.0,
        "unit": "",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "kernel": kernel_id(),
        "token": token,
    }
    descriptor = -1
    try:
        beside.mkdir()
        descriptor = os.open(beside / "lease.json", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state["flock"] = True
        except OSError:  # a file system without it
            state["flock"] = False
        os.pwrite(descriptor, _padded(state), 0)
        os.fsync(descriptor)
        if not rename_exclusively(beside, target) and read_lease(target).get("token") != token:
            raise RunInUse(f"{attempts.parent} is in use by {holder(read_lease(target))}")
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return Lease(target, descriptor, state)


def newest_attempt(attempts: Path) -> Path | None:
    """The folder of the attempt with the highest number; None where there is none."""
    found = attempt_folders(attempts)
    return found[-1] if found else None


def attempt_folders(attempts: Path) -> list[Path]:
    """The folders of a run's attempts, oldest first; no symbolic links, which lead anywhere."""
    try:
        with os.scandir(attempts) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [attempts / name for name in sorted(filter(_NUMBER.fullmatch, names), key=int)]


def read_lease(folder: Path) -> dict[str, Any]:
    """What an attempt's lease says, {} where it cannot be read or is not ours."""
    try:
        path = folder / "lease.json"
        return parse_json(read_file(path, most_bytes=_SIZE, follow_links=False), str(path))
    except (OSError, ValueError):
        return {}


def is_held(folder: Path) -> bool | None:
    """Whether the holder of an attempt lives: None where only time can tell (see `Watch`)."""
    # Read again where it makes no sense: a beat may have been written meanwhile.
    state = read_lease(folder) or read_lease(folder)
    if state.get("status") != "running":
        return False
    if state.get("kernel") != kernel_id() or state.get("flock") is not True:
        return None
    try:
        with open(folder / "lease.json", "rb", opener=open_regular) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


class Watch:
    """Tells silent leases from living ones by this observer's own monotonic clock."""

    def __init__(
        self,
        patience: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience = PATIENCE_SECONDS if patience is None else patience
        self._clock = clock
        self._seen: dict[Path, tuple[Any, float, bool]] = {}

    def is_held(self, folder: Path) -> bool | None:
        """As `is_held`, but a lease that moved is held, and one silent for too long is not.

        None as long as it has neither moved nor been silent for the patience.
        """
        known = is_held(folder)
        if known is not None:
            return known
        beat, now = read_lease(folder).get("beat"), self._clock()
        last, since, moved = self._seen.setdefault(folder, (beat, now, False))
        if beat != last:
            self._seen[folder] = beat, now, True
            return True
        if now - since >= self._patience:
            return False
        return True if moved else None


def has_advanced(state: Mapping[str, Any]) -> bool:
    """Whether an attempt has come further than where it began, as its lease says."""
    return state.get("step") != state.get("first_step")


def ask_to_stop(folder: Path) -> None:
    """Ask the holder of an attempt, on whatever machine, to write a checkpoint and stop."""
    with contextlib.suppress(OSError):
        (folder / "stop").touch()


def holder(state: Mapping[str, Any]) -> str:
    """Who holds a lease, in words."""
    return f"process {state.get('pid', '?')} on {state.get('host', 'an unknown host')}"


def rename_exclusively(source: Path, target: Path) -> bool:
    """Rename a folder that is not empty to a name that must be free; False where it is taken.

    This one step is what leases and publication stand on: POSIX has it atomic, NFS too.
    """
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


@functools.cache
def kernel_id() -> str:
    """What tells one running kernel from another: only within one does a flock prove life."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}-{secrets.token_hex(8)}"


def _padded(state: Mapping[str, Any]) -> bytes:
    line = json.dumps(state).encode("ascii")
    if len(line) >= _SIZE:  # an error of many characters that JSON has to escape
        line = json.dumps({**state, "error": state["error"][:100]}).encode("ascii")
    return line.ljust(_SIZE - 1) + b"\n"
