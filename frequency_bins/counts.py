"""How often each class occurs, and how uneven that is (paper, section 4.1)."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Int, Int64
from numpy.typing import ArrayLike
from torch import Tensor


def class_counts(
    ids: ArrayLike | Tensor, num_classes: int, *, ignore_index: int = -100
) -> Int[Tensor, " V"]:
    """Exact int64 count of each of the `num_classes` classes in `ids`, on the device of `ids`.

    `ids` has any shape and any integer dtype; entries equal to `ignore_index` do not count.
    Raises ValueError for another dtype or an id outside [0, num_classes).
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")
    flat = _integer_tensor(ids)
    kept = flat[flat != ignore_index]
    wrong = kept[(kept < 0) | (kept >= num_classes)]
    if len(wrong):
        raise ValueError(f"id {wrong[0].item()} is not a class; expected 0..{num_classes - 1}")
    return torch.bincount(kept, minlength=num_classes)


def as_counts(counts: ArrayLike | Tensor) -> Int64[np.ndarray, " V"]:
    """Class counts as an int64 array (V,), V >= 1.

    Raises ValueError unless they are integers, at least 0, along one dimension.
    """
    array = counts.numpy(force=True) if isinstance(counts, Tensor) else np.asarray(counts)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        found = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"class counts are {found}; expected integers of shape (V,)")
    if array.min() < 0 or int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"class counts range {array.min()}..{array.max()}; expected 0..2^63-1")
    return array.astype(np.int64)


def coverage(counts: ArrayLike | Tensor, fraction: float | int) -> float:
    """Share of all V classes, most frequent first, that covers `fraction` of the tokens.

    The paper's "95% of the tokens are captured by the top p of the vocabulary" (Figure 3a). The
    fraction is read as the decimal it prints as, so 0.8 of 1,000 tokens are 800. Raises
    ValueError for a fraction outside 0..1 or counts that are all 0.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected 0..1")
    descending = sorted(occurring(counts).tolist(), reverse=True)
    needed = Fraction(repr(float(fraction))) * sum(descending)
    covered = accumulate(descending, initial=0)  # Python integers: a sum may leave int64
    classes = next(k for k, tokens in enumerate(covered) if tokens >= needed)
    return classes / len(as_counts(counts))


def rare_share(counts: ArrayLike | Tensor, fraction: float | int = 0.95) -> float:
    """Share of all V classes outside the most frequent ones that cover `fraction` of the tokens.

    The paper's "ratio of tokens below the 95th percentile" (Figure 3b), with the percentile taken
    over the text as in Figure 3a: over the classes it would be the same at every vocabulary size.
    """
    return 1 - coverage(counts, fraction)


def percentile(counts: ArrayLike | Tensor, q: float | int) -> float:
    """The q-th percentile (0..100, linear) of the counts of the classes that occur.

    Raises ValueError for q out of range, or where no class occurs.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"percentile is {q}; expected 0..100")
    return float(np.percentile(occurring(counts), q))


def zipf_exponent(counts: ArrayLike | Tensor) -> float:
    """The s of count ~ rank^-s: least squares of log count on log rank, classes that occur.

    Raises ValueError if fewer than two classes occur.
    """
    descending = np.sort(occurring(counts))[::-1]
    if len(descending) < 2:
        raise ValueError("one class occurs; expected at least two for Zipf's exponent")
    log_rank = np.log(np.arange(1, len(descending) + 1))
    centred = log_rank - log_rank.mean()
    return float(-(centred @ np.log(descending)) / (centred @ centred))


def occurring(counts: ArrayLike | Tensor) -> Int64[np.ndarray, " n"]:
    """The counts of the classes that occur, in class order. ValueError if there are none."""
    array = as_counts(counts)
    if not array.any():
        raise ValueError(f"none of the {len(array)} classes occurs; expected at least one")
    return array[array > 0]


def _integer_tensor(ids: ArrayLike | Tensor) -> Int[Tensor, " N"]:
    if not isinstance(ids, Tensor):
        array = np.asarray(ids)
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"ids are {array.dtype}; expected integers")
        if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"id {array.max()} is not a class")
        # A copy: torch warns about arrays that it could not write to.
        ids = torch.from_numpy(array.astype(np.int64))
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids are {ids.dtype}; expected integers")
    return ids.flatten().long()
