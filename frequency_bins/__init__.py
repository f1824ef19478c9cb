"""Class counts, frequency bins, streaming class metrics, their summaries, and the run store."""

from __future__ import annotations

from frequency_bins.class_metrics import ClassMetrics
from frequency_bins.runs import (
    FORMAT_VERSION,
    Run,
    RunInUse,
    Study,
    class_record,
    read_study,
    run_id,
    stack,
    write_atomically,
)

__all__ = [
    "ClassMetrics",
    "FORMAT_VERSION",
    "Run",
    "RunInUse",
    "Study",
    "class_record",
    "read_study",
    "run_id",
    "stack",
    "write_atomically",
]
