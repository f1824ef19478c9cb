"""Classes grouped by how often they occur in the training data (paper, Figures 1, 6, 7, 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from frequency_bins.counts import as_counts, occurring


@dataclass(frozen=True, kw_only=True, eq=False)
class FrequencyBins:
    """K bins over V classes, frozen from training counts.

    Bin i holds the classes whose count lies in [edges[i], edges[i + 1]). It depends on the count
    alone: classes of one count share a bin, however the classes are numbered. Classes that never
    occur are in no bin; `never_occurring` says how many there are.
    """

    class_counts: Int64[Tensor, " V"]
    edges: tuple[int, ...]
    """K + 1 increasing counts. The last may exceed int64, hence Python integers."""
    labels: tuple[str, ...]
    """What the K bins are called, such as "3^0-3^1"."""

    @classmethod
    def powers(cls, class_counts: ArrayLike | Tensor, base: int = 3) -> FrequencyBins:
        """The paper's bins: counts in [base^(i-1), base^i) for i = 1, 2, ... up to the largest.

        Raises ValueError for a base below 2 or counts that are all 0.
        """
        if base < 2:
            raise ValueError(f"base is {base}; expected an integer of at least 2")
        largest = int(occurring(class_counts).max())
        edges = [1]
        while edges[-1] <= largest:
            edges.append(edges[-1] * base)
        labels = [f"{base}^{i}-{base}^{i + 1}" for i in range(len(edges) - 1)]
        return cls._of(class_counts, edges, labels)

    @classmethod
    def quantiles(cls, class_counts: ArrayLike | Tensor, num_bins: int) -> FrequencyBins:
        """Bins of about as many classes each; fewer than `num_bins` where many counts are equal."""
        _check_positive(num_bins)
        ascending = np.sort(occurring(class_counts))
        first = [i * len(ascending) // num_bins for i in range(num_bins)]
        return cls._starting(class_counts, ascending[first].tolist())

    @classmethod
    def equal_mass(cls, class_counts: ArrayLike | Tensor, num_bins: int) -> FrequencyBins:
        """Bins of about as many tokens each; fewer than `num_bins` where one count holds many."""
        _check_positive(num_bins)
        values, classes = np.unique(occurring(class_counts), return_counts=True)
        mass = [value * n for value, n in zip(values.tolist(), classes.tolist(), strict=True)]
        total, below, bins = sum(mass), 0, []
        for tokens in mass:
            bins.append(num_bins * below // total)
            below += tokens
        changes = np.diff(bins, prepend=-1) > 0
        return cls._starting(class_counts, values[changes].tolist())

    @classmethod
    def _starting(cls, class_counts: ArrayLike | Tensor, starts: Sequence[int]) -> FrequencyBins:
        edges = [*sorted(set(starts)), int(occurring(class_counts).max()) + 1]
        spans = [(low, high - 1) for low, high in pairwise(edges)]
        labels = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
        return cls._of(class_counts, edges, labels)

    @classmethod
    def _of(
        cls, class_counts: ArrayLike | Tensor, edges: Sequence[int], labels: Sequence[str]
    ) -> FrequencyBins:
        frozen = torch.from_numpy(as_counts(class_counts))
        return cls(class_counts=frozen, edges=tuple(edges), labels=tuple(labels))

    @cached_property
    def index(self) -> Int64[Tensor, " V"]:
        """The bin of each class, 0..K-1; -1 for a class that never occurs."""
        lower = np.array(self.edges[:-1], dtype=np.int64)
        found = np.searchsorted(lower, self.class_counts.numpy(), side="right") - 1
        return torch.from_numpy(found)

    @cached_property
    def sizes(self) -> Int64[Tensor, " K"]:
        """Classes in each bin."""
        return torch.bincount(self.index[self.index >= 0], minlength=len(self.labels))

    @cached_property
    def token_share(self) -> Float[Tensor, " K"]:
        """Share of the training tokens in each bin, float64, from exact integer sums."""
        tokens = [0] * len(self.labels)
        for index, count in zip(self.index.tolist(), self.class_counts.tolist(), strict=True):
            if index >= 0:
                tokens[index] += count
        return torch.tensor([t / sum(tokens) for t in tokens], dtype=torch.float64)

    @property
    def never_occurring(self) -> int:
        """Classes that are in no bin."""
        return int((self.class_counts == 0).sum())

    def __len__(self) -> int:
        return len(self.labels)


def _check_positive(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; expected at least 1")
