"""Settings compared where they have the same average loss, and differences between paired items.

Two ways to train are not comparable at the same strength of their regulariser, which means another
thing in each. So each is swept, and what it costs is read off its curve at one average loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from scipy.special import stdtrit  # scipy.stats would take a second to import

from frequency_bins.summaries import SeedBand, seed_band


@dataclass(frozen=True, kw_only=True, eq=False)
class AtAverage:
    """What S seeds of a setting have at given average losses; NaN where a curve does not get there.

    `reason` says of which seeds that is so, and how far their curves go; "" where it is of none.
    """

    values: Float[np.ndarray, " S"]
    reason: str

    @property
    def reached(self) -> bool:
        """Whether any seed's curve gets there."""
        return bool(np.isfinite(self.values).any())

    def band(self, beside: ArrayLike = 0.0) -> SeedBand:
        """Mean and 95 % interval over the seeds that got there, less `beside` (S,) seed by seed.

        Raises ValueError where none did.
        """
        apart = self.values - np.asarray(beside, dtype=np.float64)
        return seed_band(apart[np.isfinite(apart)])


def at_average(averages: ArrayLike, values: ArrayLike, at: ArrayLike) -> AtAverage:
    """Read `values` (S, P) where the average loss (S, P) of a sweep is `at` (S,), in nats.

    P points of the sweep in its order, joined by straight lines; NaN marks a point that a seed does
    not have. Where the average passes `at` more than once, the first time counts, which is at the
    weakest setting. Nothing is extrapolated. Raises ValueError for shapes that do not fit.
    """
    x, y, wanted = (np.asarray(array, dtype=np.float64) for array in (averages, values, at))
    if x.ndim != 2 or x.shape != y.shape or wanted.shape != x.shape[:1]:
        raise ValueError(
            f"averages, values and at have the shapes {x.shape}, {y.shape} and {wanted.shape}; "
            "expected (seeds, points) twice, and (seeds,)"
        )
    read = np.array([_read(*row) for row in zip(x, y, wanted, strict=True)], dtype=np.float64)
    lacking = np.isnan(read)
    reason = ""
    if lacking.any():
        ends = x[lacking][np.isfinite(x[lacking])]
        spans = f"{ends.min():.4g} to {ends.max():.4g}" if ends.size else "nothing"
        goals = [f"{goal:.4g}" for goal in wanted[lacking]]
        reason = (
            f"averages of {spans} do not reach {' and '.join(dict.fromkeys(goals))} in "
            f"{lacking.sum()} of {len(read)} seeds"
        )
    return AtAverage(values=read, reason=reason)


def _read(averages: Float[np.ndarray, " P"], values: Float[np.ndarray, " P"], at: float) -> float:
    known = np.isfinite(averages) & np.isfinite(values)
    x, y = averages[known], values[known]
    same = np.flatnonzero(x == at)
    crossed = np.flatnonzero((x[:-1] - at) * (x[1:] - at) < 0)
    if same.size and not (crossed.size and crossed[0] < same[0]):
        return float(y[same[0]])
    if not crossed.size:
        return math.nan
    i = crossed[0]
    share = (at - x[i]) / (x[i + 1] - x[i])
    return float(y[i] + share * (y[i + 1] - y[i]))


@dataclass(frozen=True, kw_only=True)
class PairedBand:
    """Mean of paired differences, and the half width of its 95 % interval.

    Over the items and the seeds, or (`over_seeds` is false) over the items alone, of one seed.
    """

    mean: float
    half_width: float
    over_seeds: bool


def paired_band(differences: ArrayLike, clusters: ArrayLike | None = None) -> PairedBand:
    """The mean over S seeds and N items of differences (S, N) between two settings.

    Items and seeds are drawn independently, so their variances add up: of the items' means over
    seeds, and of the seeds' means over items (Student's t with S - 1 degrees of freedom). Items of
    one of `clusters` (N,), such as the tokens of a review, count as drawn together. Half width NaN
    for a single cluster. Raises ValueError without any item, or for shapes that do not fit.
    """
    array = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    seeds, items = array.shape if array.ndim == 2 else (0, 0)
    labels: Int64[np.ndarray, " N"] = (
        np.arange(items) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    )
    if not items or labels.shape != (items,):
        raise ValueError(
            f"differences have the shape {array.shape}, clusters {labels.shape}; expected "
            "(seeds, items) and (items,), at least one"
        )
    mean = float(array.mean())
    # The mean is a ratio of sums over clusters: its variance, linearised.
    residuals = np.bincount(labels, weights=array.mean(axis=0) - mean)
    number = len(residuals)
    if number < 2:
        return PairedBand(mean=mean, half_width=math.nan, over_seeds=seeds > 1)
    error = math.sqrt(float((residuals**2).sum()) * number / (number - 1)) / items
    half = float(stdtrit(number - 1, 0.975)) * error
    over = seed_band(array.mean(axis=1)).half_width if seeds > 1 else 0.0
    return PairedBand(mean=mean, half_width=math.hypot(half, float(over)), over_seeds=seeds > 1)
