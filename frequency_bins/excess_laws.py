"""Laws of the excess loss over the count, and which of them a record prefers.

    saturating   e(n) = A (1 + n/n_0)^-p
    exponent     e(n) = A n^-q
    one number   1 - exp(-e(n)) = (1 - 1/V) min(1, sqrt(n_c/n))

The first is our own, found in trained models; the second is its limit for n_0 below every count;
the third is what the exact minima of the paper's model amount to (arXiv 2410.11985, section 4), in
which every sample's feature is decayed. How they are fitted: see `binned_fit`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from frequency_bins.binned_fit import (
    FEWEST_BINS,
    BinnedFit,
    ExcessTable,
    Law,
    fit_law,
    solve,
    tabulate,
)
from frequency_bins.excess_loss import class_values, whole_counts

_STEEPEST = 20.0
_REACH = math.log(1e3)  # how far outside the counts n_0 is sought: beyond, only a limit is seen


@dataclass(frozen=True, kw_only=True, eq=False)
class BinnedExcess:
    """The K bins of a fit, rarest first."""

    count: Float[np.ndarray, " K"]
    """Mean count, over the bin's tokens."""
    excess: Float[np.ndarray, " K"]
    """Mean excess in nats, over the bin's tokens."""
    fitted: Float[np.ndarray, " K"]
    """The law's mean excess."""
    classes: Int64[np.ndarray, " K"]
    left_out: int
    """Bins that are not among the K because their mean excess is not positive."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExcessFit:
    """What every fit says beside its law's parameters and R^2."""

    token_r_squared: float
    """Share of the variance of 1 - exp(-excess) over all tokens (classes weighed by count).

    NaN where it has none, because every excess is above 37 nats.
    """
    bins: BinnedExcess


@dataclass(frozen=True, kw_only=True)
class Saturating:
    """Numbers of the law e(n) = A (1 + n/n_0)^-p, or their standard errors."""

    amplitude: float
    """A in nats: the excess of a class so rare that its count does not matter."""
    saturation_count: float
    """n_0: classes rarer than this pay nearly alike."""
    exponent: float
    """p: how the excess falls beyond n_0; negative where it grows."""
    r_squared: float
    """Share of the variance of log excess over the bins that the law explains."""


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """Numbers of the law e(n) = A n^-q, or their standard errors."""

    amplitude: float
    """A in nats: the excess at n = 1."""
    exponent: float
    """q."""
    r_squared: float
    """As in `Saturating`."""


@dataclass(frozen=True, kw_only=True)
class OneNumber:
    """Numbers of the law 1 - exp(-e(n)) = (1 - 1/V) min(1, sqrt(n_c/n)), or their errors."""

    critical_count: float
    """n_c: the count below which a class is not learned."""
    r_squared: float
    """As in `Saturating`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SaturatingFit(Saturating, ExcessFit):
    """The saturating law as fitted. A standard error is inf where the record leaves it open."""

    standard_errors: Saturating


@dataclass(frozen=True, kw_only=True, eq=False)
class ExponentFit(Exponent, ExcessFit):
    """The exponent law as fitted."""

    standard_errors: Exponent


@dataclass(frozen=True, kw_only=True, eq=False)
class OneNumberFit(OneNumber, ExcessFit):
    """The one-number law as fitted."""

    standard_errors: OneNumber


def fit_excess_loss(class_counts: ArrayLike | Tensor, excess: ArrayLike | Tensor) -> SaturatingFit:
    """Fit the saturating law A (1 + n/n_0)^-p to the classes that occur.

    `class_counts` (V,) training counts; `excess` (V,) in nats, see `excess_loss`. Least squares of
    log excess over bins of factor 2, in which classes weigh by their counts. n_0 is sought from
    1/1000 of the least count to 1000 times the largest, p within +-20. Where the record tells
    only a limit of the law (n_0 far outside the counts), what it leaves open has the error inf.

    Raises ValueError for counts that are not whole, negative or all 0, shapes that differ, an
    excess that is not finite in a class that occurs, fewer than 3 bins with positive excess, and
    an excess that is the same in all of them, of which there is nothing to explain.
    """
    table = tabulate(class_counts, excess)
    fit = fit_law(_saturating(table), table)
    amplitude, count = (float(x) for x in np.exp(fit.theta[:2]))
    return SaturatingFit(
        amplitude=amplitude,
        saturation_count=count,
        exponent=float(fit.theta[2]),
        standard_errors=Saturating(
            amplitude=amplitude * float(fit.errors[0]),
            saturation_count=count * float(fit.errors[1]),
            exponent=float(fit.errors[2]),
            r_squared=fit.r_squared_error,
        ),
        **_shared(fit, table),
    )


def fit_exponent(class_counts: ArrayLike | Tensor, excess: ArrayLike | Tensor) -> ExponentFit:
    """Fit the exponent law A n^-q; arguments and errors as `fit_excess_loss`."""
    table = tabulate(class_counts, excess)
    fit = fit_law(_exponent(table), table)
    amplitude = math.exp(fit.theta[0])
    return ExponentFit(
        amplitude=amplitude,
        exponent=float(fit.theta[1]),
        standard_errors=Exponent(
            amplitude=amplitude * float(fit.errors[0]),
            exponent=float(fit.errors[1]),
            r_squared=fit.r_squared_error,
        ),
        **_shared(fit, table),
    )


def fit_one_number(
    class_counts: ArrayLike | Tensor, excess: ArrayLike | Tensor, *, vocab_size: float | int
) -> OneNumberFit:
    """Fit the one-number law of V = `vocab_size` classes; otherwise as `fit_excess_loss`.

    `ufm.fit_critical_count` fits the same law by the squares of 1 - exp(-loss) over classes, where
    rare classes with little loss weigh less than here.
    """
    table = tabulate(class_counts, excess)
    fit = fit_law(_one_number(table, checked_vocab_size(vocab_size)), table)
    count = math.exp(fit.theta[0])
    errors = OneNumber(critical_count=count * float(fit.errors[0]), r_squared=fit.r_squared_error)
    return OneNumberFit(critical_count=count, standard_errors=errors, **_shared(fit, table))


@dataclass(frozen=True, kw_only=True)
class LawComparison:
    """Cross-validated errors of the laws "saturating", "exponent" and "one number"."""

    errors: dict[str, float]
    """Root mean square error of the predicted log excess, by law."""
    preferred: str
    """The law of the least error."""
    lead: float
    """Mean squared error of the second-best law less that of the preferred one."""
    lead_error: float
    """Standard error of the lead over what was held out, bins or seeds."""


def compare_laws_over_bins(
    class_counts: ArrayLike | Tensor, excess: ArrayLike | Tensor, *, vocab_size: float | int
) -> LawComparison:
    """Leave each bin out in turn, fit the laws to the others and predict its log excess.

    Arguments as `fit_one_number`. The bins at both ends test how a law goes on beyond its data.
    Raises ValueError as the fits do, and for fewer than 4 bins.
    """
    table = tabulate(class_counts, excess)
    bins = np.arange(len(table.log_mean))
    if len(bins) <= FEWEST_BINS:
        raise ValueError(f"{len(bins)} bins have positive excess; expected 4 to leave one out")
    squares = {}
    for name, law in _laws(table, checked_vocab_size(vocab_size)).items():
        whole = solve(law, table)
        thetas = [solve(law, table, start=whole, kept=bins != k) for k in bins]
        predicted = [table.law(law, theta)[0][k] for k, theta in zip(bins, thetas, strict=True)]
        squares[name] = (np.array(predicted) - table.log_mean) ** 2
    return _comparison(squares)


def compare_laws_over_seeds(
    class_counts: ArrayLike | Tensor, excess: ArrayLike | Tensor, *, vocab_size: float | int
) -> LawComparison:
    """Leave each seed out in turn, fit the laws to the mean of the others and predict its bins.

    `excess` (S, V) of S >= 2 seeds; otherwise as `fit_one_number`. A bin whose mean excess is not
    positive in the seed left out, or in the mean of the others, is not predicted.
    """
    counts = whole_counts(class_counts)
    seeds = class_values("excess", excess, counts)
    if seeds.ndim != 2 or len(seeds) < 2:
        raise ValueError(
            f"excess has the shape {seeds.shape}; expected (seeds, V), 2 seeds or more"
        )
    size = checked_vocab_size(vocab_size)
    squares: dict[str, list[float]] = {}
    for seed in range(len(seeds)):
        table = tabulate(counts, np.delete(seeds, seed, axis=0).mean(axis=0))
        left_out = tabulate(counts, seeds[seed])
        mine = np.isin(table.octave, left_out.octave)
        theirs = np.isin(left_out.octave, table.octave)
        if not mine.any():
            raise ValueError(f"seed {seed} shares no bin of positive excess with the others")
        for name, law in _laws(table, size).items():
            predicted = table.law(law, solve(law, table))[0]
            errors = predicted[mine] - left_out.log_mean[theirs]
            squares.setdefault(name, []).append(float((errors**2).mean()))
    return _comparison({name: np.array(values) for name, values in squares.items()})


def checked_vocab_size(vocab_size: float | int) -> int:
    """V as an integer. ValueError unless it is a whole number of at least 2."""
    if not (vocab_size >= 2 and vocab_size % 1 == 0):
        raise ValueError(f"vocab_size is {vocab_size}; expected a whole number of at least 2")
    return int(vocab_size)


def _comparison(squares: dict[str, Float[np.ndarray, " n"]]) -> LawComparison:
    best, second = sorted(squares, key=lambda name: float(squares[name].mean()))[:2]
    lead = squares[second] - squares[best]
    return LawComparison(
        errors={name: math.sqrt(values.mean()) for name, values in squares.items()},
        preferred=best,
        lead=float(lead.mean()),
        lead_error=float(lead.std(ddof=1)) / math.sqrt(len(lead)),
    )


def _shared(fit: BinnedFit, table: ExcessTable) -> dict[str, Any]:
    bins = BinnedExcess(
        count=table.mean_count,
        excess=np.exp(table.log_mean),
        fitted=np.exp(fit.log_fitted),
        classes=np.bincount(table.bin_index[table.bin_index >= 0]).astype(np.int64),
        left_out=table.left_out,
    )
    return {"r_squared": fit.r_squared, "token_r_squared": fit.token_r_squared, "bins": bins}


def _laws(table: ExcessTable, vocab_size: int) -> dict[str, Law]:
    return {
        "saturating": _saturating(table),
        "exponent": _exponent(table),
        "one number": _one_number(table, vocab_size),
    }


def _saturating(table: ExcessTable) -> Law:
    """Parameters log A, log n_0, p."""

    def curve(
        theta: Float[np.ndarray, " P"], counts: Float[np.ndarray, " U"]
    ) -> tuple[Float[np.ndarray, " U"], Float[np.ndarray, "U P"]]:
        ratio = counts * math.exp(-theta[1])
        log = np.log1p(ratio)
        slopes = [np.ones_like(log), theta[2] * ratio / (1 + ratio), -log]
        return theta[0] - theta[2] * log, np.stack(slopes, axis=1)

    low, high = math.log(table.levels[0]), math.log(table.levels[-1])
    # For a given n_0 the rest is a straight line, but for how the counts lie in their bin.
    starts = []
    for log_count in np.linspace(low - 2, high + 2, 30):
        log = np.log1p(table.mean_count * math.exp(-log_count))
        slope, intercept = np.polyfit(log, table.log_mean, 1)
        exponent = np.clip(-slope, 0.01 - _STEEPEST, _STEEPEST - 0.01)
        starts.append(np.array([intercept, log_count, exponent]))
    return Law(
        curve=curve,
        lower=[-np.inf, low - _REACH, -_STEEPEST],
        upper=[np.inf, high + _REACH, _STEEPEST],
        starts=starts,
        # Small n_0: A n_0^p n^-p. Large n_0: A exp(-p n/n_0).
        partners={1: (0, 2), 2: (1, 1)},
    )


def _exponent(table: ExcessTable) -> Law:
    """Parameters log A, q."""

    def curve(
        theta: Float[np.ndarray, " P"], counts: Float[np.ndarray, " U"]
    ) -> tuple[Float[np.ndarray, " U"], Float[np.ndarray, "U P"]]:
        log = np.log(counts)
        return theta[0] - theta[1] * log, np.stack([np.ones_like(log), -log], axis=1)

    bounds = [np.inf, _STEEPEST]
    return Law(
        curve=curve,
        lower=[-bound for bound in bounds],
        upper=bounds,
        starts=[np.array([table.log_mean[0], 0.5])],
    )


def _one_number(table: ExcessTable, vocab_size: int) -> Law:
    """Parameter log n_c."""
    ceiling = 1 - 1 / vocab_size

    def curve(
        theta: Float[np.ndarray, " P"], counts: Float[np.ndarray, " U"]
    ) -> tuple[Float[np.ndarray, " U"], Float[np.ndarray, "U P"]]:
        root = np.exp((theta[0] - np.log(counts)) / 2)
        chance = ceiling * np.minimum(1.0, root)
        excess = -np.log1p(-chance)
        slope = np.where(root < 1, chance / (1 - chance) / (2 * excess), 0.0)
        return np.log(excess), slope[:, None]

    # Each bin alone asks for some n_c: the best for all lies between the least and the largest.
    share = np.minimum(1.0, -np.expm1(-np.exp(table.log_mean)) / ceiling)
    wanted = 2 * np.log(share) + np.log(table.mean_count)
    low, high = float(wanted.min()) - 1, float(wanted.max()) + 1
    starts = list(np.linspace(low, high, 32)[1:-1, None])
    return Law(curve=curve, lower=[low], upper=[high], starts=starts)
