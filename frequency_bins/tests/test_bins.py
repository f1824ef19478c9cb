"""Frequency bins: exact edges, every class placed, numbering without influence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frequency_bins import FrequencyBins

COUNTS = st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 30), min_size=1).filter(any)
SPLITS = {
    "powers": lambda counts: FrequencyBins.powers(counts),
    "quantiles": lambda counts: FrequencyBins.quantiles(counts, 4),
    "equal_mass": lambda counts: FrequencyBins.equal_mass(counts, 4),
}


@pytest.mark.parametrize("base", [2, 3, 10])
def test_powers_are_exact_on_every_edge_up_to_int64(base: int) -> None:
    exponents = [e for e in range(64) if base**e < 2**63]
    below = FrequencyBins.powers([base**e - 1 for e in exponents[1:]], base=base)
    on = FrequencyBins.powers([base**e for e in exponents], base=base)
    assert below.index.tolist() == [e - 1 for e in exponents[1:]]
    assert on.index.tolist() == exponents
    assert on.edges == tuple(base**e for e in range(len(exponents) + 1))


def test_powers_of_three_as_in_the_paper() -> None:
    bins = FrequencyBins.powers([0, 1, 2, 3, 8, 9, 27, 0])
    assert bins.labels == ("3^0-3^1", "3^1-3^2", "3^2-3^3", "3^3-3^4")
    assert bins.index.tolist() == [-1, 0, 0, 1, 1, 2, 3, -1]
    assert bins.sizes.tolist() == [2, 2, 1, 1]
    assert bins.never_occurring == 2
    assert bins.token_share.tolist() == [3 / 50, 11 / 50, 9 / 50, 27 / 50]
    assert FrequencyBins.powers([1, 27]).sizes.tolist() == [1, 0, 0, 1]  # empty bins are kept


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@given(counts=COUNTS)
def test_every_class_lies_between_the_edges_of_its_bin(split: object, counts: list[int]) -> None:
    bins = split(counts)
    assert len(bins.edges) == len(bins.labels) + 1 == len(bins) + 1
    for count, index in zip(counts, bins.index.tolist(), strict=True):
        if count == 0:
            assert index == -1
        else:
            assert bins.edges[index] <= count < bins.edges[index + 1]
    assert int(bins.sizes.sum()) + bins.never_occurring == len(counts)
    assert float(bins.token_share.sum()) == pytest.approx(1)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@given(counts=COUNTS, seed=st.integers(0, 99))
def test_numbering_of_the_classes_has_no_influence(
    split: object, counts: list[int], seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(counts))
    bins, renumbered = split(counts), split(np.array(counts)[order])
    assert renumbered.edges == bins.edges
    assert renumbered.index.tolist() == bins.index[torch.from_numpy(order)].tolist()
    assert torch.equal(renumbered.token_share, bins.token_share)


def test_quantiles_hold_equally_many_classes() -> None:
    bins = FrequencyBins.quantiles([0, *range(1, 101)], 4)
    assert bins.sizes.tolist() == [25, 25, 25, 25]
    assert bins.labels == ("1-25", "26-50", "51-75", "76-100")
    tied = FrequencyBins.quantiles([1] * 9 + [5], 4)
    assert tied.labels == ("1-5",)  # nine of ten classes cannot be told apart by count


def test_equal_mass_holds_equally_many_tokens() -> None:
    bins = FrequencyBins.equal_mass([1] * 60 + [2] * 30 + [60], 3)
    assert bins.token_share.tolist() == [1 / 3, 1 / 3, 1 / 3]
    assert bins.labels == ("1", "2-59", "60")


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=40), num_bins=st.integers(1, 6))
def test_equal_mass_against_counting_token_by_token(counts: list[int], num_bins: int) -> None:
    # A class belongs to the part of the sorted tokens in which the first token of its count lies.
    tokens = sorted(count for count in counts for _ in range(count))
    part = {count: num_bins * tokens.index(count) // len(tokens) for count in counts}
    order = sorted(set(part.values()))
    bins = FrequencyBins.equal_mass(counts, num_bins)
    assert bins.index.tolist() == [order.index(part[count]) for count in counts]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FrequencyBins.powers([1], base=1), "base is 1"),
        (lambda: FrequencyBins.powers([0, 0]), "none of the 2"),
        (lambda: FrequencyBins.quantiles([1], 0), "num_bins is 0"),
        (lambda: FrequencyBins.equal_mass([1], -2), "num_bins is -2"),
    ],
)
def test_bad_bins_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
