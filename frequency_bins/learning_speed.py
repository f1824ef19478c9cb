"""How fast each class is learned (paper, section 3, "Per-Token Learning Speed")."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike


def learning_speed(steps: ArrayLike, losses: ArrayLike) -> Float[np.ndarray, "*classes"]:
    """S = 1 - AUC / T of every loss trajectory, 0..1; higher is faster.

    `steps` (T,) are the increasing steps of the records, `losses` (T, ...) the losses there. Each
    trajectory is scaled to 0..1 by its own minimum and maximum, its area is the trapezoid rule
    over the recorded steps, and T is their span. A trajectory without range has S = 0: nothing
    was learned. One with a NaN has S = NaN (see `carry_forward`). Raises ValueError for fewer
    than two steps, steps that do not increase, or shapes that do not fit.
    """
    at = np.asarray(steps, dtype=np.float64)
    loss = np.asarray(losses, dtype=np.float64)
    if at.ndim != 1 or len(at) < 2 or not (np.diff(at) > 0).all():
        raise ValueError(f"steps are {steps!r}; expected at least two, increasing")
    if loss.shape[:1] != at.shape:
        raise ValueError(f"losses have the shape {loss.shape}; expected ({len(at)}, ...)")
    low, high = loss.min(axis=0), loss.max(axis=0)
    # The trapezoid rule in one pass: each record weighs half of the steps on its two sides.
    width = np.diff(at)
    weight = (np.append(width, 0) + np.append(0, width)) / (2 * (at[-1] - at[0]))
    spread = np.where(high > low, high - low, 1.0)
    area = np.tensordot(weight, loss - low, axes=1) / spread
    return np.asarray(np.where(high == low, 0.0, np.clip(1 - area, 0.0, 1.0)))


def carry_forward(
    losses: Float[np.ndarray, "T V"],
) -> tuple[Float[np.ndarray, "T V"], Int64[np.ndarray, " V"]]:
    """Fill the windows in which a class did not occur, and count those in which it did.

    `losses` (T, V) holds NaN where a class was not a target. A gap takes the last value before
    it, a gap at the beginning the first value after it; a class that is never seen stays NaN.
    Returns the filled losses and the windows in which each class was seen.
    """
    filled, missing = losses.copy(), np.isnan(losses)
    for row, before in zip(filled[1:], filled, strict=False):
        np.copyto(row, before, where=np.isnan(row))
    for row, after in zip(filled[-2::-1], filled[::-1], strict=False):
        np.copyto(row, after, where=np.isnan(row))
    return filled, len(losses) - missing.sum(axis=0, dtype=np.int64)


def carry_back(losses: Float[np.ndarray, "T V"]) -> Float[np.ndarray, "T V"]:
    """Fill the windows in which a class did not occur with the value that was measured next.

    Where `carry_forward` has a loss fall as late as the measurements allow, this has it fall as
    early: of a loss that only falls, the two give the least and the largest learning speed that
    its absence leaves open.
    """
    return carry_forward(losses[::-1])[0][::-1]
