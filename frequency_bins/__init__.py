"""What class counts do to class losses: bins, metrics, learning speed, summaries, laws."""

from frequency_bins.bins import FrequencyBins
from frequency_bins.class_metrics import ClassMetrics
from frequency_bins.counts import class_counts, coverage, percentile, rare_share, zipf_exponent
from frequency_bins.equal_average import AtAverage, PairedBand, at_average, paired_band
from frequency_bins.excess_laws import (
    BinnedExcess,
    Exponent,
    ExponentFit,
    LawComparison,
    OneNumber,
    OneNumberFit,
    Saturating,
    SaturatingFit,
    compare_laws_over_bins,
    compare_laws_over_seeds,
    fit_excess_loss,
    fit_exponent,
    fit_one_number,
)
from frequency_bins.excess_loss import ExcessLoss, excess_loss
from frequency_bins.learning_speed import carry_back, carry_forward, learning_speed
from frequency_bins.margin_law import margin_share, predict_bins, predict_loss, share_bins
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
    "AtAverage",
    "PairedBand",
    "at_average",
    "paired_band",
    "BinnedExcess",
    "Exponent",
    "ExponentFit",
    "LawComparison",
    "OneNumber",
    "OneNumberFit",
    "Saturating",
    "SaturatingFit",
    "compare_laws_over_bins",
    "compare_laws_over_seeds",
    "fit_excess_loss",
    "fit_exponent",
    "fit_one_number",
    "ExcessLoss",
    "excess_loss",
    "carry_back",
    "carry_forward",
    "learning_speed",
    "margin_share",
    "predict_bins",
    "predict_loss",
    "BinSummary",
    "SeedBand",
    "average_accuracy",
    "average_loss",
    "bin_summary",
    "perplexity",
    "seed_band",
    "share_bins",
    "token_balanced_accuracy",
    "token_balanced_loss",
    "WindowHistory",
]
