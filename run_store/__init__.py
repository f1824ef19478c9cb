"""Crash-safe runs: one folder a run, written by one attempt at a time, read without torch."""

from run_store import signals as signals  # isort: skip; Ctrl-C is one line while all else is imported
from run_store.attempts import Attempt, Diverged, Stopped, attempt, publish
from run_store.devices import resolve_device
from run_store.leases import LeaseLost, RunInUse
from run_store.records import FORMAT_VERSION, class_record
from run_store.runs import Run, Study, read_study, run_id, stack, write_atomically

__all__ = [
    "FORMAT_VERSION",
    "Attempt",
    "Diverged",
    "LeaseLost",
    "Run",
    "RunInUse",
    "Stopped",
    "Study",
    "attempt",
    "class_record",
    "publish",
    "read_study",
    "resolve_device",
    "run_id",
    "stack",
    "write_atomically",
]
