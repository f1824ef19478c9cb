"""Least squares of the log excess loss over bins of the count, for any law with a few parameters.

Bins of factor 2 (counts 1, 2-3, 4-7, ...). A bin's excess is the mean over its classes, weighed by
their counts, and so is the law's: where in the bin a count stands for it need not be chosen. The
bins weigh the same. A bin whose mean is not positive has no log and is left out.

A bin is off the law for two reasons, and standard errors know both: its classes spread, and the law
itself holds only so far. The first variance comes from the classes, the second, the same in every
bin, is what the residuals show beyond the first (Hedges' moment estimator for random effects).
Both go through the Jacobian of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy.typing import ArrayLike
from scipy.optimize import least_squares
from torch import Tensor

from frequency_bins.bins import FrequencyBins
from frequency_bins.excess_loss import class_values, whole_counts

FEWEST_BINS = 3

Curve = Callable[
    [Float[np.ndarray, " P"], Float[np.ndarray, " U"]],
    tuple[Float[np.ndarray, " U"], Float[np.ndarray, "U P"]],
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Law:
    """log e(n) and its derivatives by P parameters; bounds, and where to start, within them."""

    curve: Curve
    lower: list[float]
    upper: list[float]
    starts: list[Float[np.ndarray, " P"]]
    partners: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Which other parameter is not determined where this one ends at its lower, upper bound."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExcessTable:
    """M classes that occur, rarest first; their U different counts; K bins with positive excess."""

    counts: Float[np.ndarray, " M"]
    excess: Float[np.ndarray, " M"]
    bin_index: Int64[np.ndarray, " M"]
    """0..K-1; -1 in a bin that is left out."""
    octave: Int64[np.ndarray, " K"]
    """Of each bin: its counts are from 2^octave on."""
    levels: Float[np.ndarray, " U"]
    shares: Float[np.ndarray, "K U"]
    """Of the bin's tokens, those whose class has this count."""
    log_mean: Float[np.ndarray, " K"]
    left_out: int

    @property
    def mean_count(self) -> Float[np.ndarray, " K"]:
        """Over the bin's tokens."""
        return np.asarray(self.shares @ self.levels)

    def law(
        self, law: Law, theta: Float[np.ndarray, " P"]
    ) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "K P"]]:
        """Log of the law's mean over each bin's tokens, and its derivatives."""
        log_excess, slopes = law.curve(theta, self.levels)
        top = log_excess.max()
        parts = self.shares * np.exp(log_excess - top)
        sums = parts.sum(axis=1)
        return top + np.log(sums), parts @ slopes / sums[:, None]


def tabulate(class_counts: ArrayLike | Tensor, excess: ArrayLike | Tensor) -> ExcessTable:
    """Counts and excess (V,) in bins.

    Raises ValueError as `whole_counts` and `class_values`, for fewer than 3 bins with positive
    excess, and for an excess that is the same in all of them.
    """
    whole = whole_counts(class_counts)
    values = class_values("excess", excess, whole)
    if values.ndim != 1:
        raise ValueError(f"excess has the shape {values.shape}; expected (V,), that of one seed")
    # In this order no sum depends on how the classes are numbered.
    order = np.lexsort((values, whole))[np.count_nonzero(whole == 0) :]
    whole, values = whole[order], values[order]
    counts = whole.astype(np.float64)
    octaves, index = np.unique(FrequencyBins.powers(whole, 2).index.numpy(), return_inverse=True)
    tokens = np.bincount(index, weights=counts)
    means = np.bincount(index, weights=counts * values) / tokens
    kept = means > 0
    if kept.sum() < FEWEST_BINS:
        raise ValueError(
            f"{kept.sum()} of {len(kept)} bins of factor 2 have a positive mean excess; "
            f"expected at least {FEWEST_BINS}"
        )
    log_mean = np.log(means[kept])
    if np.ptp(log_mean) < 1e-12:
        raise ValueError(f"the excess is {means[kept][0]} in every bin; expected one that varies")
    levels, level = np.unique(counts, return_inverse=True)
    shares = np.zeros((len(kept), len(levels)))
    np.add.at(shares, (index, level), counts / tokens[index])
    return ExcessTable(
        counts=counts,
        excess=values,
        bin_index=np.where(kept, np.cumsum(kept) - 1, -1)[index],
        octave=octaves[kept],
        levels=levels,
        shares=shares[kept],
        log_mean=log_mean,
        left_out=int((~kept).sum()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class BinnedFit:
    """Parameters, their standard errors (inf: not determined), and how well the law fits."""

    theta: Float[np.ndarray, " P"]
    errors: Float[np.ndarray, " P"]
    log_fitted: Float[np.ndarray, " K"]
    r_squared: float
    r_squared_error: float
    token_r_squared: float


def fit_law(law: Law, table: ExcessTable) -> BinnedFit:
    """The best fit, with errors."""
    theta = solve(law, table)
    log_fitted, slopes = table.law(law, theta)
    residuals = table.log_mean - log_fitted
    spread = table.log_mean - table.log_mean.mean()
    rss, tss = float(residuals @ residuals), float(spread @ spread)
    class_law = np.exp(law.curve(theta, table.counts)[0])
    errors, variances = _errors(law, theta, slopes, residuals, _class_noise(table, class_law))
    # How R^2 moves with each bin: the parameters move too, but at the minimum rss does not feel it.
    r_squared_slopes = 2 * (rss / tss * spread - residuals) / tss
    return BinnedFit(
        theta=theta,
        errors=errors,
        log_fitted=log_fitted,
        r_squared=1 - rss / tss,
        r_squared_error=math.sqrt(variances @ r_squared_slopes**2)
        if np.isfinite(variances).all()
        else math.inf,
        token_r_squared=_token_r_squared(table, class_law),
    )


def _token_r_squared(table: ExcessTable, class_law: Float[np.ndarray, " M"]) -> float:
    chance, fitted = -np.expm1(-table.excess), -np.expm1(-class_law)
    spread = table.counts @ (chance - np.average(chance, weights=table.counts)) ** 2
    left = table.counts @ (chance - fitted) ** 2
    return float(1 - left / spread) if spread > 0 else math.nan


def solve(
    law: Law,
    table: ExcessTable,
    *,
    start: Float[np.ndarray, " P"] | None = None,
    kept: Bool[np.ndarray, " K"] | None = None,
) -> Float[np.ndarray, " P"]:
    """The parameters of the least sum of squares over the kept bins.

    From `start`, or else from the best of the law's starts.
    """
    chosen = np.ones(len(table.log_mean), dtype=bool) if kept is None else kept

    def residuals(theta: Float[np.ndarray, " P"]) -> Float[np.ndarray, " k"]:
        return np.asarray((table.law(law, theta)[0] - table.log_mean)[chosen])

    def slopes(theta: Float[np.ndarray, " P"]) -> Float[np.ndarray, "k P"]:
        return np.asarray(table.law(law, theta)[1][chosen])

    def squares(theta: Float[np.ndarray, " P"]) -> float:
        return float((residuals(theta) ** 2).sum())

    best = min(law.starts, key=squares) if start is None else start
    solution = least_squares(
        residuals,
        best,
        jac=slopes,
        bounds=(law.lower, law.upper),
        x_scale="jac",
        ftol=1e-14,
        xtol=1e-12,
        gtol=1e-12,
        max_nfev=500,
    )
    return np.asarray(solution.x)


def _class_noise(table: ExcessTable, class_law: Float[np.ndarray, " M"]) -> Float[np.ndarray, " K"]:
    """Variance of each bin's log mean, from the spread of its classes about the law.

    To the classes of each bin is added one that spreads as those of all bins do, which is what a
    bin of a single class goes by. Zero where no bin has two classes.
    """
    used = table.bin_index >= 0
    index, counts = table.bin_index[used], table.counts[used]
    ratio = table.excess[used] / class_law[used]
    classes = np.bincount(index)
    around = ratio - (np.bincount(index, weights=ratio) / classes)[index]
    squares = np.bincount(index, weights=around**2)
    several = classes > 1
    typical = (squares[several] / (classes[several] - 1)).mean() if several.any() else 0.0
    share = counts / np.bincount(index, weights=counts)[index]
    return np.asarray((squares + typical) / classes * np.bincount(index, weights=share**2))


def _errors(
    law: Law,
    theta: Float[np.ndarray, " P"],
    slopes: Float[np.ndarray, "K P"],
    residuals: Float[np.ndarray, " K"],
    noise: Float[np.ndarray, " K"],
) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " K"]]:
    """Standard errors of theta and the variances of the bins' log means behind them."""
    at_bound = [
        (i, side)
        for side, bounds in enumerate((law.lower, law.upper))
        for i, bound in enumerate(bounds)
        if abs(theta[i] - bound) < 1e-2
    ]
    stuck = [i for i, _ in at_bound]
    free = np.setdiff1d(np.arange(len(theta)), stuck)
    left, sizes, right = np.linalg.svd(slopes[:, free], full_matrices=False)
    sound = sizes > 1e-9 * sizes.max(initial=1.0)
    left, inverse = left[:, sound], right[sound].T / sizes[sound]
    spare = len(residuals) - int(sound.sum())
    unexplained = residuals @ residuals - (1 - (left**2).sum(axis=1)) @ noise
    variances = noise + max(0.0, float(unexplained)) / max(spare, 1)
    errors = np.full(len(theta), np.inf)
    if spare == 0 and not noise.any():  # as many parameters as bins, and one class in each
        return errors, np.full(len(noise), np.inf)
    errors[free] = np.sqrt((inverse @ left.T) ** 2 @ variances)
    lost = [int(i) for i in free[(abs(right[~sound]) > 1e-6).any(axis=0)]]
    lost += [law.partners[i][side] for i, side in at_bound if i in law.partners]
    errors[lost] = np.inf
    return errors, variances
