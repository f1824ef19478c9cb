"""Class counts, frequency bins, streaming class metrics, their summaries, and the run store."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from frequency_bins.attempts import Attempt, Diverged, Stopped, attempt, publish
from frequency_bins.learning_speed import carry_back, carry_forward, learning_speed
from frequency_bins.leases import LeaseLost, RunInUse
from frequency_bins.records import FORMAT_VERSION, class_record
from frequency_bins.runs import (
    Run,
    Study,
    read_study,
    run_id,
    stack,
    write_atomically,
)

if TYPE_CHECKING:
    from frequency_bins.bins import FrequencyBins
    from frequency_bins.class_metrics import ClassMetrics
    from frequency_bins.counts import class_counts, coverage, percentile, rare_share, zipf_exponent
    from frequency_bins.devices import resolve_device
    from frequency_bins.summaries import (
        BinSummary,
        SeedBand,
        average_accuracy,
        average_loss,
        bin_summary,
        perplexity,
        seed_band,
        token_balanced_accuracy,
        token_balanced_loss,
    )

# In modules that need torch, whose import takes seconds: who only reads runs, or hands them out,
# does without.
_LATER = ("bins", "class_metrics", "counts", "devices", "summaries")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(importlib.import_module, (f"{__name__}.{part}" for part in _LATER)):
            if name in vars(module):
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "FrequencyBins",
    "ClassMetrics",
    "class_counts",
    "coverage",
    "percentile",
    "rare_share",
    "zipf_exponent",
    "carry_back",
    "carry_forward",
    "learning_speed",
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
    "BinSummary",
    "SeedBand",
    "average_accuracy",
    "average_loss",
    "bin_summary",
    "perplexity",
    "seed_band",
    "token_balanced_accuracy",
    "token_balanced_loss",
]
