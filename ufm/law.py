"""The law loss = -log(1 - (1 - 1/V) (n_c / n)^((1 + s) / 2)) fitted to observed losses: one number,
n_c, at a given feature_sharing s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ufm.problem import as_tensor, checked_sharing


@dataclass(frozen=True, kw_only=True, eq=False)
class CriticalCountFit:
    """The least-squares fit of the law, in u = 1 - exp(-loss), the mean chance of a miss."""

    critical_count: float
    """n_c: the count below which a class is not learned."""
    r_squared: float
    """Share of the (weighted) variance of u that the law explains; NaN where u does not vary."""
    residuals: Float[Tensor, " V"]
    """u observed less u fitted; NaN for classes left out."""
    vocab_size: int
    feature_sharing: float = 0.0

    def loss(self, counts: Sequence[Any] | np.ndarray | Tensor) -> Float[Tensor, ...]:
        """The fitted loss in nats at any counts >= 0; log V from n_c down."""
        power = 0.5 * (1.0 + self.feature_sharing)
        values = as_tensor("counts", counts).to(torch.float64) ** power
        return -torch.log1p(-_law(self.critical_count**power, values, self.vocab_size))


def fit_critical_count(
    counts: Sequence[Any] | np.ndarray | Tensor,
    losses: Sequence[Any] | np.ndarray | Tensor,
    *,
    vocab_size: float | int,
    weights: Sequence[Any] | np.ndarray | Tensor | None = None,
    feature_sharing: float | int = 0.0,
) -> CriticalCountFit:
    """Exact global least squares of u = (1 - 1/V) min(1, (n_c / n)^((1 + feature_sharing) / 2)).

    counts: (V,) training counts; losses: (V,) mean losses in nats; weights: (V,) >= 0, default
    ones. Classes with count 0, NaN loss or weight 0 are left out. In that power of n_c the sum of
    squares is a parabola between neighbouring counts, so its minimum is found exactly. Where every
    class is at chance, n_c is the largest count (the least value with that fit). Source:
    ufm/THEORY.md, sections 2 and 6.

    Raises ValueError on feature_sharing outside [0, 1], shapes that differ, negative or infinite
    values, or no class left.
    """
    if not (vocab_size >= 2 and vocab_size % 1 == 0):
        raise ValueError(f"vocab_size is {vocab_size}; expected a whole number >= 2")
    n = _vector("counts", counts)
    loss = _vector("losses", losses, allow_nan=True)
    weight = torch.ones_like(n) if weights is None else _vector("weights", weights)
    if not n.shape == loss.shape == weight.shape:
        raise ValueError(
            f"counts, losses and weights have shapes {tuple(n.shape)}, {tuple(loss.shape)} and "
            f"{tuple(weight.shape)}; expected equal ones"
        )
    used = (n > 0) & ~loss.isnan() & (weight > 0)
    if not bool(used.any()):
        raise ValueError("no class has a count > 0, a loss and a weight; expected at least one")
    observed = -torch.expm1(-loss)
    vocab_size, sharing = int(vocab_size), checked_sharing(feature_sharing)
    roots = n ** (0.5 * (1.0 + sharing))
    root = _best_root(roots[used], observed[used], weight[used], vocab_size)
    residuals = torch.where(used, observed - _law(root, roots, vocab_size), torch.nan)
    return CriticalCountFit(
        critical_count=root ** (2.0 / (1.0 + sharing)),
        r_squared=_r_squared(observed[used], residuals[used], weight[used]),
        residuals=residuals,
        vocab_size=vocab_size,
        feature_sharing=sharing,
    )


def _law(root: float, root_counts: Float[Tensor, ...], vocab_size: int) -> Float[Tensor, ...]:
    share = torch.where(root_counts > root, root / root_counts, 1.0)
    return (1.0 - 1.0 / vocab_size) * share


def _best_root(
    root_counts: Float[Tensor, " M"],
    observed: Float[Tensor, " M"],
    weight: Float[Tensor, " M"],
    vocab_size: int,
) -> float:
    """sqrt(n_c) of the least sum of squares (for other roots of the counts, that root of n_c)."""
    ceiling = 1.0 - 1.0 / vocab_size
    order = root_counts.argsort()
    s, u, w = root_counts[order], observed[order], weight[order]
    # Interval j: the classes before j are at chance, those from j on follow t / s. Last: all are.
    edges = torch.cat([s.new_zeros(1), s])
    chance = _running(w * (u - ceiling).square())
    total = (w * u.square()).sum()
    square = total - _running(w * u.square())
    cross = ceiling * _remaining(w * u / s)
    curve = ceiling**2 * _remaining(w / s.square())
    upper = torch.cat([s, s[-1:]])
    t = torch.where(curve > 0, cross / curve, s[-1]).clamp(min=edges, max=upper)
    sums = chance + square - 2.0 * t * cross + t.square() * curve
    # Running sums lose digits where the fit is close to perfect: the best few are summed afresh.
    best = t[sums.argsort()[:16]]
    afresh = torch.stack(
        [(w * (u - _law(float(root), s, vocab_size)).square()).sum() for root in best]
    )
    return float(best[afresh.argmin()])


def _running(values: Float[Tensor, " M"]) -> Float[Tensor, " M+1"]:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _remaining(values: Float[Tensor, " M"]) -> Float[Tensor, " M+1"]:
    return torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])


def _r_squared(
    observed: Float[Tensor, " M"], residuals: Float[Tensor, " M"], weight: Float[Tensor, " M"]
) -> float:
    mean = (weight * observed).sum() / weight.sum()
    spread = float((weight * (observed - mean).square()).sum())
    return 1.0 - float((weight * residuals.square()).sum()) / spread if spread > 0 else math.nan


def _vector(
    name: str, values: Sequence[Any] | np.ndarray | Tensor, *, allow_nan: bool = False
) -> Float[Tensor, " V"]:
    vector = as_tensor(name, values).detach().to("cpu", torch.float64)
    bad = (vector < 0) | vector.isinf() | (vector.isnan() & (not allow_nan))
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected one value a class")
    if bool(bad.any()):
        raise ValueError(f"{name} holds {vector[bad][0].item()}; expected finite values >= 0")
    return vector
