"""Loss weights that repair what weight decay does to rare classes (ufm/THEORY.md, section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ufm.problem import as_tensor, checked_sharing

AVERAGE_EXPONENT = 0.25
"""a_k ~ n_k^-1/4 makes the average loss least, in the limit of weak decay (n_c far below n_k)."""
EQUAL_EXPONENT = 0.5
"""a_k ~ n_k^-1/2 makes all losses equal, exactly, as long as lambda_W lambda_H is below
((V-1)/V) / (sum_j sqrt(n_j))^2; above, all classes collapse at once."""
BALANCED_EXPONENT = 0.75
"""a_k ~ n_k^-3/4 makes the class-balanced loss least, in the limit of weak decay. Above one
half, the most frequent classes are the first to collapse."""

Goal: TypeAlias = Literal["average", "equal", "balanced"]
"""What a repair is for: the least average loss, equal losses, the least class-balanced loss."""


def repair_exponent(goal: Goal, feature_sharing: float | int = 0.0) -> float:
    """g of the loss weights n_k^-g that reach the goal where features are decayed with this s.

    (1 + s)/4 for the least average loss and (3 + s)/4 for the least class-balanced one, in the
    limit of weak decay; (1 + s)/2 for equal losses, exactly, until all classes collapse at once.
    Source: ufm/THEORY.md, section 6.

    Raises ValueError for another goal, or s outside [0, 1].
    """
    sharing = checked_sharing(feature_sharing)
    exponents = {
        "average": AVERAGE_EXPONENT + 0.25 * sharing,
        "equal": EQUAL_EXPONENT + 0.5 * sharing,
        "balanced": BALANCED_EXPONENT + 0.25 * sharing,
    }
    if goal not in exponents:
        raise ValueError(f"goal is {goal!r}; expected one of {', '.join(exponents)}")
    return exponents[goal]


def repair_weights(
    class_counts: Sequence[Any] | np.ndarray | Tensor,
    exponent: float | int | Goal,
    *,
    feature_sharing: float | int = 0.0,
) -> Float[Tensor, " V"]:
    """Loss weights a_k ~ n_k^-exponent with sum_k a_k n_k = N; 0 for classes that never occur.

    exponent: a number, or a goal, whose exponent `repair_exponent` gives for this feature_sharing.

    Raises ValueError for counts that are negative, not whole or all zero, an exponent that is
    neither finite nor a goal, or feature_sharing outside [0, 1].
    """
    if isinstance(exponent, str):
        exponent = repair_exponent(exponent, feature_sharing)
    counts = as_tensor("class_counts", class_counts).to(torch.float64)
    if counts.ndim != 1:
        raise ValueError(f"class_counts has shape {tuple(counts.shape)}; expected one a class")
    bad = ~((counts >= 0) & torch.isfinite(counts) & (counts == counts.floor()))
    if bool(bad.any()):
        raise ValueError(f"class_counts holds {counts[bad][0].item()}; expected whole numbers >= 0")
    if not np.isfinite(exponent):
        raise ValueError(f"exponent is {exponent}; expected a finite number")
    occurs = counts > 0
    if not bool(occurs.any()):
        raise ValueError("class_counts are all 0; expected one class that occurs")
    # Relative to the largest count, so that no power overflows.
    weights = torch.where(occurs, (counts / counts.max()) ** -exponent, 0.0)
    if not bool(torch.isfinite((weights * counts).sum())):
        raise ValueError(f"exponent is {exponent}; expected one whose weights float64 can hold")
    return weights * (counts.sum() / (weights * counts).sum())


def weak_decay_losses(
    class_counts: Sequence[Any] | np.ndarray | Tensor,
    *,
    loss_exponent: float | int = 0.0,
    row_exponent: float | int = 0.0,
    feature_sharing: float | int = 0.0,
) -> tuple[float, float]:
    """Average and class-balanced loss that a repair leaves of each, as a share, at weak decay.

    Loss weights n_k^-loss_exponent and a decay d_k ~ n_k^row_exponent of the classifier's rows,
    whose sum stays that of equal rows. At weak decay, where every class is learned well, loss_k is
    1/r_k to first order; source: ufm/THEORY.md, section 6. Equal losses: row_exponent 1 + s without
    loss weights, as V grows. Classes that never occur have a row of the count 1.

    Raises ValueError as `repair_weights`, for a row exponent whose powers float64 cannot hold, and
    with fewer than two classes.
    """
    sharing = checked_sharing(feature_sharing)
    weights = repair_weights(class_counts, loss_exponent).double()
    counts = as_tensor("class_counts", class_counts).double()
    rows = counts.clamp(min=1) / counts.max()
    rows = rows**row_exponent / (rows**row_exponent).mean()
    classes = len(counts)
    if classes < 2 or not bool((torch.isfinite(rows) & (rows > 0)).all()):
        raise ValueError(
            f"row_exponent is {row_exponent} for {classes} classes; expected at least two, and "
            "an exponent whose powers float64 can hold"
        )
    occurs = counts > 0
    n, a, d = counts[occurs], weights[occurs], rows[occurs]
    plain = n ** (-(1 + sharing) / 2)
    left = plain / a * (d * (classes - d) / (classes - 1)).sqrt()
    return float((n * left).sum() / (n * plain).sum()), float(left.sum() / plain.sum())
