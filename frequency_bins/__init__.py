"""What class counts do to class losses: bins, metrics, learning speed, summaries, excess."""

from frequency_bins.bins import FrequencyBins
from frequency_bins.class_metrics import ClassMetrics
from frequency_bins.counts import class_counts, coverage, percentile, rare_share, zipf_exponent
from frequency_bins.excess_loss import ExcessLoss, excess_loss
from frequency_bins.learning_speed import carry_back, carry_forward, learning_speed
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
from frequency_bins.windows import WindowHistory

__all__ = [
    "FrequencyBins",
    "ClassMetrics",
    "class_counts",
    "coverage",
    "percentile",
    "rare_share",
    "zipf_exponent",
    "ExcessLoss",
    "excess_loss",
    "carry_back",
    "carry_forward",
    "learning_speed",
    "BinSummary",
    "SeedBand",
    "average_accuracy",
    "average_loss",
    "bin_summary",
    "perplexity",
    "seed_band",
    "token_balanced_accuracy",
    "token_balanced_loss",
    "WindowHistory",
]
