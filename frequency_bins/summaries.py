"""From per-class values to the numbers of the paper: averages, bins and seed bands.

Every sum over classes is correctly rounded (math.fsum), so no result depends on how the classes
are numbered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from scipy.special import stdtrit  # scipy.stats would take a second to import
from torch import Tensor

from frequency_bins.bins import FrequencyBins


def average_loss(
    counts: ArrayLike | Tensor, losses: ArrayLike | Tensor
) -> Float[np.ndarray, "*batch"]:
    """Mean loss over tokens in nats, L_avg of section 3: sum(count * loss) / sum(count).

    `counts` and `losses` (..., V); classes with count 0 do not enter, whatever their loss. NaN
    where no class has a count.
    """
    return _weighted_mean(_counts_like(counts, losses), _array(losses))


def token_balanced_loss(
    counts: ArrayLike | Tensor, losses: ArrayLike | Tensor
) -> Float[np.ndarray, "*batch"]:
    """Mean of the class losses in nats, L_tok-bal of section 3, over the classes that occur.

    `counts` and `losses` (..., V). The paper divides by V; a class without a target has no loss,
    so the mean here is over the classes with a count.
    """
    return _weighted_mean(_counts_like(counts, losses) > 0, _array(losses))


def average_accuracy(
    counts: ArrayLike | Tensor, accuracies: ArrayLike | Tensor
) -> Float[np.ndarray, "*batch"]:
    """Share of correct tokens; see `average_loss`."""
    return average_loss(counts, accuracies)


def token_balanced_accuracy(
    counts: ArrayLike | Tensor, accuracies: ArrayLike | Tensor
) -> Float[np.ndarray, "*batch"]:
    """Mean of the class accuracies; see `token_balanced_loss`."""
    return token_balanced_loss(counts, accuracies)


def perplexity(loss: ArrayLike | Tensor | float) -> Float[np.ndarray, "*batch"]:
    """exp(loss), for a loss in nats."""
    return np.asarray(np.exp(_array(loss)))


@dataclass(frozen=True, kw_only=True)
class BinSummary:
    """Sum, mean and standard deviation over the classes of each bin; NaN without values."""

    labels: tuple[str, ...]
    total: Float[np.ndarray, "*batch K"]
    """Weighted sum of the values: with the counts as weights, the bin's part of the total loss."""
    mean: Float[np.ndarray, "*batch K"]
    std: Float[np.ndarray, "*batch K"]
    """Population standard deviation: 0 for a single class."""
    classes: Int64[np.ndarray, "*batch K"]
    """Classes that had a value."""


def bin_summary(
    bins: FrequencyBins, values: ArrayLike | Tensor, counts: ArrayLike | Tensor | None = None
) -> BinSummary:
    """Summarise per-class `values` (..., V) by frequency bin; NaN values do not enter.

    Every class of a bin weighs the same, or as `counts` (..., V) say: then the mean is over the
    tokens of the bin. Raises ValueError if V is not that of the bins.
    """
    array = _array(values)
    if array.shape[-1:] != (len(bins.class_counts),):
        expected = len(bins.class_counts)
        raise ValueError(f"values have the shape {array.shape}; expected (..., {expected})")
    weights = np.ones_like(array) if counts is None else _counts_like(counts, array)
    weights = np.where(np.isnan(array), 0.0, weights)
    members = [np.flatnonzero(bins.index.numpy() == i) for i in range(len(bins))]
    columns = [(weights[..., m], array[..., m]) for m in members]
    totals = [_weighted_sum(w, v) for w, v in columns]
    weight = [_sums(w) for w, _ in columns]
    with np.errstate(invalid="ignore"):
        means = [total / w for total, w in zip(totals, weight, strict=True)]
        squares = [
            _weighted_sum(w, (v - mean[..., None]) ** 2)
            for (w, v), mean in zip(columns, means, strict=True)
        ]
        variances = [square / w for square, w in zip(squares, weight, strict=True)]
    return BinSummary(
        labels=bins.labels,
        total=np.stack(totals, axis=-1),
        mean=np.stack(means, axis=-1),
        std=np.sqrt(np.stack(variances, axis=-1)),
        classes=np.stack([(w > 0).sum(axis=-1, dtype=np.int64) for w, _ in columns], axis=-1),
    )


@dataclass(frozen=True, kw_only=True)
class SeedBand:
    """A quantity over seeds."""

    mean: Float[np.ndarray, "*shape"]
    std: Float[np.ndarray, "*shape"]
    """Sample standard deviation (ddof 1); NaN for a single seed."""
    half_width: Float[np.ndarray, "*shape"]
    """Half width of the 95 % confidence interval of the mean (Student's t); NaN for one seed."""


def seed_band(values: ArrayLike | Tensor) -> SeedBand:
    """Mean and spread of `values` (seeds, ...) over the first axis.

    Raises ValueError without any seed.
    """
    array = _array(values)
    seeds = len(array) if array.ndim else 0
    if seeds < 1:
        raise ValueError(f"values have the shape {array.shape}; expected (seeds, ...)")
    mean = array.mean(axis=0)
    if seeds == 1:
        nothing = np.full_like(mean, np.nan)
        return SeedBand(mean=np.asarray(mean), std=nothing, half_width=nothing)
    std = array.std(axis=0, ddof=1)
    quantile = float(stdtrit(seeds - 1, 0.975))
    half_width = quantile * std / math.sqrt(seeds)
    return SeedBand(mean=np.asarray(mean), std=np.asarray(std), half_width=np.asarray(half_width))


def _weighted_mean(
    weights: np.ndarray, values: Float[np.ndarray, "*batch n"]
) -> Float[np.ndarray, "*batch"]:
    """sum(weight * value) / sum(weight) along the last axis; NaN where no weight is positive."""
    with np.errstate(invalid="ignore"):
        return np.asarray(_weighted_sum(weights, values) / _sums(weights.astype(np.float64)))


def _weighted_sum(
    weights: np.ndarray, values: Float[np.ndarray, "*batch n"]
) -> Float[np.ndarray, "*batch"]:
    return _sums(weights * np.where(weights > 0, values, 0.0))


def _sums(array: Float[np.ndarray, "*batch n"]) -> Float[np.ndarray, "*batch"]:
    *batch, n = array.shape
    rows = array.reshape(math.prod(batch), n)
    return np.array([_fsum(row) for row in rows], dtype=np.float64).reshape(batch)


def _fsum(row: np.ndarray) -> float:
    # math.fsum raises where a sum overflows or meets inf - inf; there a plain sum is inf or NaN.
    return math.fsum(row.tolist()) if np.isfinite(row).all() else float(row.sum())


def _counts_like(counts: ArrayLike | Tensor, values: ArrayLike | Tensor) -> np.ndarray:
    weights = counts.numpy(force=True) if isinstance(counts, Tensor) else np.asarray(counts)
    shape = np.shape(_array(values))
    if weights.ndim < 1 or weights.shape[-1:] != shape[-1:]:
        raise ValueError(
            f"counts have the shape {weights.shape}, values {shape}; expected (..., V)"
        )
    if (weights < 0).any():
        raise ValueError(f"counts hold {weights.min()}; expected at least 0")
    return np.broadcast_to(weights, np.broadcast_shapes(weights.shape, shape))


def _array(values: ArrayLike | Tensor | float) -> Float[np.ndarray, "*shape"]:
    array = values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)
    return array.astype(np.float64)
