"""Writing to a run: one attempt at a time, in a folder of its own, published by renames.

    <run>/attempts/0003/manifest.json      how this attempt was made (device, versions, ...)
    <run>/attempts/0003/scalars.jsonl      moves up to the run's folder when the run is published
    <run>/attempts/0003/checkpoint-...     which a later attempt may go on from
    <run>/attempts/winner/0003             the attempt whose record the run has

To publish, an attempt writes everything into its own folder and then takes the name `winner` by a
rename that cannot replace what is there: of two attempts that get so far, one wins, whichever was
taken for dead before. What is left to do is to move the winner's files up and to write the run's
manifest; whoever comes next can finish that after a crash between any two steps (`complete`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr

from run_store.command_line import USER_ERRORS, one_line
from run_store.devices import is_out_of_memory
from run_store.input_files import is_integer
from run_store.leases import (
    Lease,
    LeaseLost,
    acquire,
    attempt_folders,
    rename_exclusively,
)
from run_store.records import record_bytes
from run_store.runs import (
    Run,
    json_document,
    naming,
    read_json,
    read_scalars,
    sha256,
    sync_folder,
    write_atomically,
)

# What stays of an attempt when the run is published: who did it, and how it ended.
_KEPT = ("lease.json", "manifest.json")

TERMINATED = threading.Event()
"""Set when this process is asked to end (SIGTERM): every attempt in it should stop."""


class Diverged(Exception):
    """The loss is no longer finite: the run has a result, but no record."""


class Stopped(Exception):
    """The run was asked to stop, and did, with a checkpoint to go on from."""


class Attempt:
    """One attempt at a run, by the one process that may write to it; see `attempt`."""

    def __init__(self, run: Run, lease: Lease) -> None:
        self.run, self.lease, self.folder = run, lease, lease.folder
        self.status, self.error = "waiting", ""
        self._fields: dict[str, Any] = {}

    def folders(self) -> list[Path]:
        """Where checkpoints may lie: this attempt's folder, then those before it, newest first.

        The run's own folder comes last: runs from before there were attempts kept theirs there.
        """
        earlier = attempt_folders(self.folder.parent)
        return [self.folder, *(f for f in reversed(earlier) if f != self.folder), self.run.folder]

    def update(self, **fields: Any) -> None:
        """Set fields of the attempt's manifest, which join the run's when it is published.

        Raises ValueError for its id, config or format version, which cannot change.
        """
        fixed = {"format_version", "run_id", "config"} & set(fields)
        if fixed:
            raise ValueError(f"{sorted(fixed)} of a run cannot change")
        document = json_document(self._fields | fields)
        write_atomically(self.folder / "manifest.json", document)
        self._fields |= fields

    def resume(self, step: int, source: Path | None = None) -> None:
        """Go on after `step`, with the scalars up to it that `source` (a folder) holds."""
        self.lease.begin_at(step)
        rows = [] if source is None else read_scalars(source / "scalars.jsonl")
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows if row["step"] <= step]
        if lines:
            write_atomically(self.folder / "scalars.jsonl", "".join(lines).encode("ascii"))

    def advance(self, step: int, rate: float = 0.0, unit: str = "") -> None:
        """The run has come to `step`, at a `rate` of `unit` (tokens/s, say); for `status`."""
        self.lease.advance(step, rate, unit)

    def should_stop(self) -> bool:
        """Whether to write a checkpoint and raise Stopped. LeaseLost if the run is another's."""
        if self.lease.lost.is_set():
            self.lease.check()
        return TERMINATED.is_set() or self.lease.stop.is_set()

    def append_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Append one line; ValueError without an integer `step`. Non-finite numbers become null."""
        if not is_integer(scalars.get("step")):
            raise ValueError(f"step is {scalars.get('step')!r}; expected an integer")
        _append(self.folder / "scalars.jsonl", scalars)

    def publish(self, dataset: xr.Dataset, *, files: Sequence[str] = (), **fields: Any) -> None:
        """Make this attempt's record the run's, with `files` of its folder beside it.

        `fields` join the manifest. Equal arrays give equal bytes. Nothing that is published is
        ever replaced.

        Raises:
            LeaseLost: another attempt was published, or has begun.
            ValueError: a dataset that class_record would not make.
            OSError: a write that failed; the run is as it was.
        """
        content = record_bytes(dataset)
        write_atomically(self.folder / "classes.nc", content)
        scalars = self.folder / "scalars.jsonl"
        names = ["classes.nc", *files]
        if scalars.exists():
            with scalars.open("rb") as file:
                os.fsync(file.fileno())
            names.append(scalars.name)
        outcome = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "classes_sha256": sha256(content),
            "attempt": self.lease.number,
            "files": names,
        }
        self.update(**(outcome | fields))
        self.lease.check()
        self._win()
        complete(self.run)
        self.status = "finished"

    def _win(self) -> None:
        beside = self.folder / ".winner.partial"
        beside.mkdir(exist_ok=True)
        (beside / self.folder.name).touch()
        if not rename_exclusively(beside, self.folder.parent / "winner"):
            shutil.rmtree(beside)
            # A file server may have done a rename and say otherwise when it is asked again.
            if winner(self.run) != self.folder:
                raise LeaseLost(f"{self.run.folder} was published by another process")
        sync_folder(self.folder.parent)

    def withdraw(self) -> None:
        """Take back a record that was damaged, so that this attempt can make it again."""
        self.lease.check()
        manifest = self.run.stored_manifest
        for name in ("classes.nc", "scalars.jsonl", *_published(manifest, self.run.folder)):
            _remove(self.run.folder / name)
        document = json_document(manifest | {"status": "new"})
        write_atomically(self.run.folder / "manifest.json", document)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.folder.parent / "winner", self.folder / "withdrawn")


@contextlib.contextmanager
def attempt(run: Run, *, dead: int = 0) -> Iterator[Attempt]:
    """A new attempt at a run, which nobody else may write to until it ends.

    `dead` is the number of an attempt whose holder was seen to be dead (`leases.Watch`). How the
    attempt ended is told by its `status`: finished once it published, failed with the error that
    leaves the context, waiting where it only stopped.

    Raises:
        RunInUse: at once, if another process may hold the run.
    """
    lease = acquire(run.folder / "attempts", dead=dead)
    new = Attempt(run, lease)
    try:
        complete(run)
        yield new
    except (Stopped, LeaseLost):
        raise
    except Exception as error:
        if new.status == "waiting":
            new.status = "diverged" if isinstance(error, Diverged) else "failed"
            new.error = error_line(error)
        raise
    finally:
        lease.end(new.status, new.error)


def error_line(error: BaseException) -> str:
    """What went wrong on one line: with the error's type where it is a bug and no bad input."""
    name, line = type(error).__name__, one_line(error)
    if is_out_of_memory(error):
        return f"out of memory: lower --batch-size or --runs-in-parallel ({line[:200]})"
    return line if isinstance(error, (*USER_ERRORS, Diverged, Stopped)) else f"{name}: {line}"


def publish(run: Run, dataset: xr.Dataset, **fields: Any) -> None:
    """Publish a record that is there already, in one attempt; see `Attempt.publish`."""
    with attempt(run) as whole:
        whole.publish(dataset, **fields)


def winner(run: Run) -> Path | None:
    """The folder of the attempt that was published, or is about to be; None without one."""
    attempts = run.folder / "attempts"
    with contextlib.suppress(FileNotFoundError):
        names = {path.name for path in (attempts / "winner").iterdir()}
        return next((f for f in attempt_folders(attempts) if f.name in names), None)
    return None


def complete(run: Run) -> None:
    """Finish what a crash left of a publication: nothing to do but after one.

    Any process may do this at any time, several at once too: every step is a rename that is done
    or not, of files that no longer change.
    """
    folder = winner(run)
    manifest = run.stored_manifest
    if folder is None or manifest["status"] == "finished":
        return
    fields = read_json(folder / "manifest.json")
    for name in _published(fields, folder):
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder / name, run.folder / name)
    for old in attempt_folders(folder.parent):
        for path in old.iterdir():
            if path.name not in _KEPT:
                _remove(path)
    document = json_document(manifest | fields | {"status": "finished", "error": None})
    write_atomically(run.folder / "manifest.json", document)


def _published(manifest: Mapping[str, Any], folder: Path) -> list[str]:
    """The names under "files" in a manifest: plain ones, since they are moved and removed."""
    names = manifest.get("files", [])
    if not isinstance(names, list):
        raise ValueError(f"{folder / 'manifest.json'}: files is {names!r}; expected a list")
    for name in names:
        plain = isinstance(name, str) and os.path.basename(name) == name and "\0" not in name
        if not plain or name in ("", ".", "..", "attempts", *_KEPT):
            raise ValueError(f"{folder / 'manifest.json'}: {name!r} is not the name of a file")
    return names


def _append(path: Path, scalars: Mapping[str, Any]) -> None:
    line = json.dumps(_finite(scalars), allow_nan=False).encode("ascii") + b"\n"
    with open(path, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a write cut short by a crash
                file.seek(0)
                end = file.read().rfind(b"\n") + 1
                file.truncate(end)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            file.truncate(end)
            raise naming(error, path) from None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and value - value != 0 else value


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
