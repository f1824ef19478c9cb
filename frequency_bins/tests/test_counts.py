"""Counts, coverage, percentiles and Zipf's exponent against plain Python."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frequency_bins import class_counts, coverage, percentile, zipf_exponent

INTEGER_DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@given(ids=st.lists(st.integers(0, 9)), dtype=st.sampled_from(INTEGER_DTYPES))
def test_class_counts_are_those_of_a_counter(ids: list[int], dtype: str) -> None:
    expected = [Counter(ids)[k] for k in range(10)]
    counts = class_counts(np.array(ids, dtype=dtype), 10)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected
    assert class_counts(torch.tensor(ids, dtype=torch.int32), 10).tolist() == expected


def test_class_counts_ignores_one_index_and_takes_any_shape() -> None:
    ids = torch.tensor([[0, -100, 3], [3, 3, -100]])
    assert class_counts(ids, 4).tolist() == [1, 0, 0, 3]
    assert class_counts(ids.clamp(min=0), 4, ignore_index=0).tolist() == [0, 0, 0, 3]
    assert class_counts([], 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 4], r"id 4 .* expected 0\.\.3"),
        ([0, -1], "id -1"),
        (np.array([2**64 - 1], dtype=np.uint64), "18446744073709551615"),
        ([0.5], "float64"),
        (torch.tensor([True]), "bool"),
        (torch.tensor([1.0]), "float32"),
    ],
)
def test_class_counts_names_what_is_wrong(ids: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_counts(ids, 4)


def test_coverage_of_the_papers_example() -> None:
    # 100 classes, 1,000 tokens, one class with 800 of them: 80 % by the top 1 % (section 4.1).
    counts = [800] + [200 // 99] * 97 + [3] * 2
    assert sum(counts) == 1000
    assert coverage(counts, 0.8) == 0.01
    assert coverage(counts, 0.801) == 0.02
    assert coverage(counts, 0) == 0
    assert coverage([5, 0, 0, 5], 1) == 0.5


@given(
    counts=st.lists(st.integers(0, 2**62), min_size=1, max_size=30).filter(any),
    fraction=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
def test_coverage_is_the_fewest_classes_and_ignores_numbering(
    counts: list[int], fraction: float, seed: int
) -> None:
    classes = round(coverage(counts, fraction) * len(counts))
    most = sorted(counts, reverse=True)
    percent = round(fraction * 100)
    assert sum(most[:classes]) * 100 >= percent * sum(counts)
    assert sum(most[: classes - 1]) * 100 < percent * sum(counts)
    shuffled = np.random.default_rng(seed).permutation(counts)
    assert coverage(shuffled, fraction) == coverage(counts, fraction)


def test_percentile_leaves_out_classes_that_never_occur() -> None:
    assert percentile([0, 0, 1, 2, 3], 50) == 2
    assert percentile([0, 10, 20], 25) == 12.5


@given(exponent=st.floats(0.3, 3), scale=st.integers(10**14, 10**15))
def test_zipf_exponent_of_a_power_law(exponent: float, scale: int) -> None:
    counts = [round(scale * rank**-exponent) for rank in range(1, 60)]
    shuffled = np.random.default_rng(0).permutation([*counts, 0, 0])
    assert zipf_exponent(shuffled) == pytest.approx(exponent, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coverage([1], 1.5), "fraction is 1.5"),
        (lambda: coverage([0, 0], 0.5), "none of the 2 classes"),
        (lambda: coverage([-1, 2], 0.5), "-1"),
        (lambda: coverage([0.5], 0.5), "float64"),
        (lambda: coverage([[1]], 0.5), r"\(1, 1\)"),
        (lambda: percentile([1], 101), "101"),
        (lambda: zipf_exponent([4, 0]), "at least two"),
    ],
)
def test_bad_counts_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
