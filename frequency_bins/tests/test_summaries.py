"""Averages, bins and seed bands: exact sums, numbering without influence, known numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frequency_bins import (
    ClassMetrics,
    FrequencyBins,
    average_accuracy,
    average_loss,
    bin_summary,
    perplexity,
    seed_band,
    token_balanced_accuracy,
    token_balanced_loss,
)

CLASSES = st.lists(
    st.tuples(st.integers(0, 10**6), st.floats(0, 30)), min_size=1, max_size=40
).filter(lambda classes: any(count for count, _ in classes))


def arrays(classes: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.array([count for count, _ in classes])
    losses = np.array([loss if count else np.nan for count, loss in classes])
    return counts, losses


@given(classes=CLASSES)
def test_averages_against_fractions(classes: list[tuple[int, float]]) -> None:
    counts, losses = arrays(classes)
    seen = [(count, Fraction(loss)) for count, loss in classes if count]
    average = sum(c * x for c, x in seen) / sum(c for c, _ in seen)
    balanced = sum(x for _, x in seen) / len(seen)
    assert average_loss(counts, losses) == pytest.approx(float(average), rel=1e-14)
    assert token_balanced_loss(counts, losses) == pytest.approx(float(balanced), rel=1e-14)


@given(classes=CLASSES)
def test_bin_sums_add_up_to_the_total_loss(classes: list[tuple[int, float]]) -> None:
    counts, losses = arrays(classes)
    bins = FrequencyBins.powers(counts)
    summary = bin_summary(bins, losses, counts)
    total = math.fsum(c * x for c, x in zip(counts, losses, strict=True) if c)
    assert math.fsum(summary.total) == pytest.approx(total, rel=1e-15)
    assert total == pytest.approx(float(average_loss(counts, losses)) * counts.sum(), rel=1e-14)
    assert summary.classes.sum() + bins.never_occurring == len(counts)


@given(stream=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2**20)), min_size=1))
def test_bin_sums_are_exactly_the_streams_sum(stream: list[tuple[int, int]]) -> None:
    # Losses that are multiples of 2^-10 add up without rounding, so every sum must be equal.
    metrics = ClassMetrics(7)
    target = torch.tensor([k for k, _ in stream])
    loss = torch.tensor([x / 1024 for _, x in stream], dtype=torch.float64)
    metrics.update(loss, target, torch.ones_like(target))
    bins = FrequencyBins.powers(metrics.count)
    summary = bin_summary(bins, metrics.loss_sum)
    assert summary.total.sum() == metrics.loss_sum.sum().item() == loss.sum().item()


@given(classes=CLASSES, seed=st.integers(0, 99))
def test_numbering_of_the_classes_changes_no_bit(
    classes: list[tuple[int, float]], seed: int
) -> None:
    counts, losses = arrays(classes)
    order = np.random.default_rng(seed).permutation(len(counts))
    for measure in (average_loss, token_balanced_loss):
        assert measure(counts[order], losses[order]) == measure(counts, losses)
    summary = bin_summary(FrequencyBins.powers(counts), losses)
    renumbered = bin_summary(FrequencyBins.powers(counts[order]), losses[order])
    np.testing.assert_array_equal(renumbered.mean, summary.mean)
    np.testing.assert_array_equal(renumbered.std, summary.std)


def test_the_two_losses_differ_as_in_the_paper() -> None:
    counts, losses = [9, 1, 0], [0.1, 2.0, 50.0]
    assert average_loss(counts, losses) == pytest.approx(0.29)
    assert token_balanced_loss(counts, losses) == pytest.approx(1.05)
    assert average_accuracy(counts, [1.0, 0.0, 0.0]) == 0.9
    assert token_balanced_accuracy(counts, [1.0, 0.0, 0.0]) == 0.5
    # Table 1, weight decay 0 and 1: the per-token perplexity is exp of the per-token loss.
    assert perplexity(0.0) == 1
    assert perplexity([0.066, 0.163]) == pytest.approx([1.069, 1.177], abs=1e-3)


def test_batches_of_runs_and_tensors() -> None:
    counts = torch.tensor([3, 0, 1])
    losses = torch.tensor([[1.0, float("nan"), 5.0], [2.0, float("nan"), 2.0]])
    assert average_loss(counts, losses).tolist() == [2.0, 2.0]
    assert token_balanced_loss(counts.expand(2, 3), losses).tolist() == [3.0, 2.0]
    assert np.isnan(average_loss([0, 0], [1.0, 2.0]))
    assert np.isnan(average_loss([1, 1], [np.nan, 2.0]))  # a diverged class is not hidden
    assert average_loss([1, 1], [np.inf, 2.0]) == np.inf


def test_bin_summary_of_known_values() -> None:
    bins = FrequencyBins.powers([1, 2, 2, 27, 0])
    summary = bin_summary(bins, [[1.0, 5.0, np.nan, 5.0, 9.0], [2.0, 2.0, 2.0, 2.0, np.nan]])
    nan = np.nan
    np.testing.assert_array_equal(summary.mean, [[3, nan, nan, 5], [2, nan, nan, 2]])
    np.testing.assert_array_equal(summary.std, [[2, nan, nan, 0], [0, nan, nan, 0]])
    np.testing.assert_array_equal(summary.classes, [[2, 0, 0, 1], [3, 0, 0, 1]])
    weighted = bin_summary(bins, [1.0, 3.0, 3.0, 5.0, 9.0], counts=[1, 1, 2, 4, 0])
    np.testing.assert_array_equal(weighted.mean, [2.5, nan, nan, 5])
    np.testing.assert_array_equal(weighted.total, [10, 0, 0, 20])
    assert summary.labels == bins.labels


def test_seed_band_is_students() -> None:
    band = seed_band([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert band.mean.tolist() == [2.0, 5.0]
    assert band.std.tolist() == [1.0, 0.0]
    # t(0.975, 2) = 4.302652729749462 (tables)
    assert band.half_width[0] == pytest.approx(4.302652729749462 / math.sqrt(3), rel=1e-10)
    single = seed_band([4.0])
    assert single.mean == 4
    assert np.isnan(single.std)
    assert np.isnan(single.half_width)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average_loss([1, 2], [1.0]), r"counts have the shape \(2,\), values \(1,\)"),
        (lambda: average_loss([-1], [1.0]), "-1"),
        (lambda: bin_summary(FrequencyBins.powers([1, 2]), [1.0]), r"expected \(\.\.\., 2\)"),
        (lambda: seed_band([]), r"expected \(seeds, \.\.\.\)"),
    ],
)
def test_what_does_not_fit_is_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
