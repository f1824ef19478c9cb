"""The margin law: what a class loses under decoupled decay, from what it loses at a small one.

The margin M = log(p / (1 - p)) - log(q / (1 - q)) is how far the chance p = exp(-loss) of the right
class stands above the chance q that the class has without any context. kappa is the decay times the
sum of the learning rate over the steps: weights that nothing pushes back shrink by exp(-kappa).

First order, q = 1/V:   M(kappa) = M(0) exp(-kappa s),   s in (0, 1) a number of the class

Second order, q = the class's share of the tokens: s = 1 / (1 + rho p) changes with p. Decay takes
M dkappa of the margin, and the class's own gradients, which grow with its residual 1 - p, win
back rho times the change of log(1 - p), of which the slope over M is -p. So a class wins back the
less the further it is given up. rho comes from the small decay: nothing is fitted.

How far it goes, from kappa_at = 0.048, as the error of the loss over bins of factor 2 (six records:
two tiny models, python-docs with two seeds, IMDB with another, which was not chosen on): at kappa =
0.24 a root mean square of 3 to 6 % by the first order and 1 to 6 % by the second, at 0.48 of 14 to
21 % and 6 to 12 %. What is left has a sign: rare classes come out too low, frequent ones too high.

Both are our own, found in small transformers under AdamW; the paper (arXiv 2410.11985) has neither.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from frequency_bins.excess_laws import checked_vocab_size
from frequency_bins.excess_loss import ExcessLoss, Numbers, as_numbers


def predict_loss(
    loss_without: Numbers,
    loss_at: Numbers,
    kappa_at: Numbers,
    kappa: Numbers,
    *,
    vocab_size: float | int,
    prior: Numbers | None = None,
) -> Float[np.ndarray, "*shape"]:
    """The losses in nats at `kappa`, from those without decay and those at `kappa_at` > 0.

    `loss_without` and `loss_at` are mean losses of bins or classes, of one shape, of runs with the
    same seed; NaN in both (a class that never occurs) stays NaN. `kappa_at` and `kappa` >= 0
    are numbers, or arrays that broadcast with them. Without a `prior` the law is of first order
    and each chance is 1/V, V = `vocab_size`. `prior`, which broadcasts with the losses, holds each
    class's share of the tokens (for a bin that of its typical class); with it the law is of second
    order, but for classes whose s is not in (0, 1), which keep it.

    Paired seeds in rows give rows: `seed_band` of them is the prediction with its interval.

    Raises ValueError for shapes that do not fit, losses outside (0, -log q), NaN in one loss
    alone, a kappa that is negative or not finite, kappa_at = 0 and a prior outside (0, 1).
    """
    offset, before, after = _margins(loss_without, loss_at, vocab_size, prior)
    at, to = _kappa("kappa_at", kappa_at), _kappa("kappa", kappa)
    _check("kappa_at", at, at > 0, "a run with decay, kappa_at > 0")
    offset, before, after, at, to = _broadcast(offset, before, after, at, to)
    lost = np.asarray(np.log(before / after))
    shrinkage = np.asarray(lost * (to / at))
    if prior is not None:
        won_back = np.asarray((lost > 0) & (lost < at))
        shrinkage[won_back] = _second_order(*(x[won_back] for x in (before, offset, lost, at, to)))
    return np.asarray(np.log1p(np.exp(-(before * np.exp(-shrinkage) + offset))))


def predict_bins(
    pairs: ExcessLoss,
    kappa_at: float,
    kappa: float,
    *,
    vocab_size: int,
    second_order: bool = True,
) -> Float[np.ndarray, "S K"]:
    """Mean losses in nats of each seed's bins at `kappa`, from runs at decay 0 and at `kappa_at`.

    `pairs` are those runs. The typical class of a bin, whose chance the second order needs, is one
    of the bin's mean count. NaN where a bin has no class, or a loss that is 0 or no better than
    chance, of which the law says nothing. Otherwise as `predict_loss`.
    """
    if not second_order:
        return predict_loss(
            *_known(pairs, math.log(vocab_size)), kappa_at, kappa, vocab_size=vocab_size
        )
    share = pairs.bin_count / float(pairs.bins.class_counts.sum())
    with np.errstate(divide="ignore"):
        without, at = _known(pairs, -np.log(share))
    prior = np.where(np.isnan(without), 0.5, share)
    return predict_loss(without, at, kappa_at, kappa, vocab_size=vocab_size, prior=prior)


def share_bins(pairs: ExcessLoss, kappa_at: float, *, vocab_size: int) -> Float[np.ndarray, "S K"]:
    """`margin_share` of each seed's bins, by the first order; NaN as in `predict_bins`."""
    return margin_share(*_known(pairs, math.log(vocab_size)), kappa_at, vocab_size=vocab_size)


def _known(
    pairs: ExcessLoss, ceiling: float | Float[np.ndarray, " K"]
) -> tuple[Float[np.ndarray, "S K"], Float[np.ndarray, "S K"]]:
    """Mean losses of bins without and with decay; NaN where either is 0 or not below `ceiling`."""
    without, at = pairs.bin_floor, pairs.bin_floor + pairs.bin_excess
    known = (without > 0) & (at > 0) & (without < ceiling) & (at < ceiling)
    return np.where(known, without, np.nan), np.where(known, at, np.nan)


def margin_share(
    loss_without: Numbers,
    loss_at: Numbers,
    kappa_at: Numbers,
    *,
    vocab_size: float | int,
    prior: Numbers | None = None,
) -> Float[np.ndarray, "*shape"]:
    """s = log(M(0) / M(kappa_at)) / kappa_at: what of the decay of its margin a class suffers.

    1: all of it; 0: all is won back; negative: the class gains. Arguments and errors as in
    `predict_loss`.
    """
    _, before, after = _margins(loss_without, loss_at, vocab_size, prior)
    at = _kappa("kappa_at", kappa_at)
    _check("kappa_at", at, at > 0, "a run with decay, kappa_at > 0")
    before, after, at = _broadcast(before, after, at)
    return np.asarray(np.log(before / after) / at)


def _second_order(
    before: Float[np.ndarray, " n"],
    offset: Float[np.ndarray, " n"],
    lost: Float[np.ndarray, " n"],
    at: Float[np.ndarray, " n"],
    to: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """x = log(M(0) / M) at `to`, which solves x + rho I(x) = to, where x(at) = lost gives rho.

    I(x) is the integral of p over log M from M(0) down to M(0) exp(-x).
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def chance(x: Float[np.ndarray, "*nodes n"]) -> Float[np.ndarray, "*nodes n"]:
        return np.asarray(1 / (1 + np.exp(-(before * np.exp(-x) + offset))))

    def integral(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return np.asarray(x / 2 * (weights @ chance((1 + nodes[:, None]) * x / 2)))

    rho = (at - lost) / integral(lost)
    x = lost * (to / at)
    # The left side rises and is concave in x: after one step Newton's method comes from below.
    for _ in range(50):
        step = (x + rho * integral(x) - to) / (1 + rho * chance(x))
        x = x - step
        if (abs(step) <= 1e-15 * x).all():
            break
    return np.asarray(x)


def _margins(
    loss_without: Numbers,
    loss_at: Numbers,
    vocab_size: float | int,
    prior: Numbers | None,
) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    """Log odds of the prior chance, and the margins above it without and with decay."""
    size = checked_vocab_size(vocab_size)
    without, at = as_numbers("loss_without", loss_without), as_numbers("loss_at", loss_at)
    if without.shape != at.shape:
        raise ValueError(
            f"loss_without has the shape {without.shape}, loss_at {at.shape}; expected one shape"
        )
    chances = as_numbers("prior", 1 / size if prior is None else prior)
    _check("prior", chances, (chances > 0) & (chances < 1), "0 < share < 1")
    try:
        chances = np.broadcast_to(chances, at.shape)
    except ValueError:
        raise ValueError(
            f"prior has the shape {chances.shape}; expected that of the losses, {at.shape}"
        ) from None
    ceiling, absent = -np.log(chances), np.isnan(without) & np.isnan(at)
    known = f"0 < loss < {'log V' if prior is None else '-log prior'}, better than chance"
    for name, loss in (("loss_without", without), ("loss_at", at)):
        _check(name, loss, absent | ((loss > 0) & (loss < ceiling)), known)
    offset = np.asarray(-np.log(np.expm1(ceiling)))
    before, after = (np.asarray(-np.log(np.expm1(loss)) - offset) for loss in (without, at))
    return offset, before, after


def _kappa(name: str, kappa: Numbers) -> Float[np.ndarray, "*kappas"]:
    array = as_numbers(name, kappa)
    _check(name, array, (array >= 0) & (array < math.inf), "a finite number of at least 0")
    return array


def _check(name: str, array: Float[np.ndarray, "*shape"], good: ArrayLike, expected: str) -> None:
    wrong = array[~np.asarray(good)]
    if wrong.size:
        raise ValueError(f"{name} holds {wrong[0]}; expected {expected}")


def _broadcast(*arrays: Float[np.ndarray, ...]) -> tuple[Float[np.ndarray, ...], ...]:
    try:
        return tuple(np.broadcast_arrays(*arrays))
    except ValueError:
        shapes = ", ".join(str(array.shape) for array in arrays[1:])
        raise ValueError(
            f"losses and kappas have the shapes {shapes}; expected kappas that are numbers, or "
            "broadcast with the losses"
        ) from None
