"""The part of a class's loss that weight decay adds: its excess over the run without decay.

At decay 0 every class keeps a floor, the loss of contexts that do not determine the next token,
which depends little on the count. Only what a run with decay loses beyond the run of the same seed
without it is decay's doing (the paper, arXiv 2410.11985, shows the sum of the two). Where there is
no run at decay 0 there is no excess: nothing here estimates a floor from a run with decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from frequency_bins.bins import FrequencyBins
from frequency_bins.counts import as_counts
from frequency_bins.summaries import SeedBand, bin_summary, seed_band

Numbers = ArrayLike | Tensor | float | int


@dataclass(frozen=True, kw_only=True, eq=False)
class ExcessLoss:
    """Floor and excess of S paired seeds, in nats, by class and by bin.

    Excess may be negative: a class can gain from decay. NaN marks a class that never occurs
    (`bins.never_occurring` counts them) and a bin without classes.
    """

    bins: FrequencyBins
    """K bins of factor 2: counts 1, 2-3, 4-7, ..."""
    floor: Float[np.ndarray, "S V"]
    """The loss without decay."""
    excess: Float[np.ndarray, "S V"]
    """The loss with decay less the floor."""
    bin_floor: Float[np.ndarray, "S K"]
    """Mean over the bin's classes, weighed by their counts."""
    bin_excess: Float[np.ndarray, "S K"]

    @property
    def bin_count(self) -> Float[np.ndarray, " K"]:
        """Mean count, over the bin's tokens; NaN without classes."""
        counts = self.bins.class_counts.numpy()
        return bin_summary(self.bins, counts.astype(np.float64), counts).mean

    def floor_band(self) -> SeedBand:
        """Mean of `bin_floor` over the seeds with its 95 % interval; see `seed_band`."""
        return seed_band(self.bin_floor)

    def excess_band(self) -> SeedBand:
        """Mean of `bin_excess` over the seeds: each seed is its own pair, so what a seed does to
        both of its runs is not in the interval."""
        return seed_band(self.bin_excess)


def excess_loss(
    class_counts: ArrayLike | Tensor,
    losses: ArrayLike | Tensor,
    losses_without: ArrayLike | Tensor,
) -> ExcessLoss:
    """Floor and excess of runs with decay over runs without, class by class and in bins.

    `class_counts` (V,) training counts; `losses` and `losses_without` (V,), or (S, V) with the
    same seed in the same row and otherwise the same settings: mean losses in nats. Values of
    classes with count 0 do not matter. Raises ValueError for counts that are not whole, negative or
    all 0, shapes that do not fit, and a loss of a class that occurs that is negative or not finite.
    """
    counts = whole_counts(class_counts)
    pair = [
        class_values(f"losses{suffix}", values, counts)
        for suffix, values in (("", losses), ("_without", losses_without))
    ]
    with_decay, floor = (np.atleast_2d(values) for values in pair)
    if with_decay.shape != floor.shape:
        raise ValueError(
            f"losses have the shape {pair[0].shape}, losses_without {pair[1].shape}; "
            "expected the same seeds and classes"
        )
    for values in (with_decay, floor):
        if (values[:, counts > 0] < 0).any():
            lowest = values[:, counts > 0].min()
            raise ValueError(f"a class that occurs has the loss {lowest}; expected at least 0")
    bins = FrequencyBins.powers(counts, base=2)
    excess = with_decay - floor
    return ExcessLoss(
        bins=bins,
        floor=floor,
        excess=excess,
        bin_floor=bin_summary(bins, floor, counts).mean,
        bin_excess=bin_summary(bins, excess, counts).mean,
    )


def whole_counts(class_counts: ArrayLike | Tensor) -> Int64[np.ndarray, " V"]:
    """Class counts (V,) as int64; whole numbers stored as floats are counts too.

    Raises ValueError for anything else, and where no class occurs.
    """
    if isinstance(class_counts, Tensor):
        is_float = class_counts.is_floating_point()
        class_counts = (class_counts.double() if is_float else class_counts).numpy(force=True)
    array = np.asarray(class_counts)
    if array.dtype.kind == "f" and array.size:
        wrong = array[~np.isfinite(array) | (np.floor(array) != array)]
        if wrong.size:
            raise ValueError(f"class counts hold {wrong[0]}; expected whole numbers")
        if abs(array).max() < 2**63:
            array = array.astype(np.int64)
    counts = as_counts(array)
    if not counts.any():
        raise ValueError(f"none of the {len(counts)} classes occurs; expected at least one")
    return counts


def class_values(
    name: str, values: ArrayLike | Tensor, counts: Int64[np.ndarray, " V"]
) -> Float[np.ndarray, "*seeds V"]:
    """Values (V,) or (S, V) as float64, NaN where a class never occurs.

    Raises ValueError for another shape or a value that is not finite in a class that occurs.
    """
    array = as_numbers(name, values)
    if array.ndim not in (1, 2) or array.shape[-1] != len(counts) or not array.size:
        raise ValueError(
            f"{name} have the shape {array.shape}; expected ({len(counts)},) or "
            f"(seeds, {len(counts)}), one value a class"
        )
    array = np.where(counts > 0, array, np.nan)
    wrong = np.argwhere(~np.isfinite(array) & (counts > 0))
    if len(wrong):
        place, k = tuple(wrong[0]), wrong[0][-1]
        raise ValueError(
            f"{name} of class {k}, which occurs {counts[k]} times, are {array[place]}; "
            "expected finite values"
        )
    return array


def as_numbers(name: str, values: Numbers) -> Float[np.ndarray, "*shape"]:
    """Values as float64. ValueError for what is neither integers nor floats."""
    if isinstance(values, Tensor):
        values = values.double().numpy(force=True)
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} is {array.dtype}; expected numbers")
    return array.astype(np.float64)
