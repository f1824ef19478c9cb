"""The streaming accumulator against a dictionary, and its independence of the batches."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from frequency_bins import ClassMetrics

CLASSES = 5
TARGET = st.sampled_from([-100, *range(CLASSES)])
LOSS = st.floats(0, 100, width=32)
STREAM = st.lists(st.tuples(TARGET, LOSS, st.booleans()), max_size=60)


def tensors(stream: list[tuple[int, float, bool]]) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.tensor([t for t, _, _ in stream], dtype=torch.int64)
    loss = torch.tensor([x for _, x, _ in stream], dtype=torch.float32)
    correct = torch.tensor([c for _, _, c in stream], dtype=torch.bool)
    return loss, target, correct


@given(stream=STREAM)
def test_state_is_that_of_algorithm_1(stream: list[tuple[int, float, bool]]) -> None:
    seen = defaultdict(list)
    for target, loss, correct in stream:
        seen[target].append((loss, correct))
    metrics = ClassMetrics(CLASSES)
    metrics.update(*tensors(stream))
    for k in range(CLASSES):
        losses = [loss for loss, _ in seen[k]]
        assert metrics.count[k] == len(losses)
        # At most 60 additions, each off by 2^-53 of the sum at most.
        assert metrics.loss_sum[k].item() == pytest.approx(math.fsum(losses), rel=1e-14, abs=0)
        assert metrics.correct[k] == sum(correct for _, correct in seen[k])
        if losses:
            mean = math.fsum(losses) / len(losses)
            assert metrics.loss[k].item() == pytest.approx(mean, rel=1e-14, abs=0)
            assert metrics.accuracy[k] == sum(c for _, c in seen[k]) / len(losses)
        else:
            assert math.isnan(metrics.loss[k])
            assert math.isnan(metrics.accuracy[k])


@given(stream=STREAM, cuts=st.lists(st.integers(0, 60)))
def test_cutting_the_stream_changes_no_bit(
    stream: list[tuple[int, float, bool]], cuts: list[int]
) -> None:
    whole, cut = ClassMetrics(CLASSES), ClassMetrics(CLASSES)
    whole.update(*tensors(stream))
    places = [0, *sorted(cuts), len(stream)]
    for start, stop in pairwise(places):
        cut.update(*tensors(stream[start:stop]))
    for name, state in whole.state_dict().items():
        assert torch.equal(state, cut.state_dict()[name])


def test_cutting_a_long_stream_changes_no_bit_with_several_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(200_000, generator=generator)
    target = torch.randint(0, 50, (200_000,), generator=generator)
    threads = torch.get_num_threads()
    states = []
    try:
        for batch, num_threads in [(200_000, 2), (4_096, 2), (777, 1)]:
            torch.set_num_threads(num_threads)
            metrics = ClassMetrics(50)
            for start in range(0, len(loss), batch):
                part = slice(start, start + batch)
                metrics.update(loss[part], target[part], target[part] % 2)
            states.append(metrics.loss_sum)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


@given(stream=STREAM, seed=st.integers(0, 99))
def test_renumbering_the_classes_renumbers_the_state(
    stream: list[tuple[int, float, bool]], seed: int
) -> None:
    new = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(seed))
    loss, target, correct = tensors(stream)
    metrics, renumbered = ClassMetrics(CLASSES), ClassMetrics(CLASSES)
    metrics.update(loss, target, correct)
    renumbered.update(loss, torch.where(target < 0, target, new[target.clamp(min=0)]), correct)
    assert torch.equal(renumbered.count[new], metrics.count)
    assert torch.equal(renumbered.loss_sum[new], metrics.loss_sum)


def test_counts_beyond_float32_and_sums_beyond_float32() -> None:
    metrics = ClassMetrics(1)
    metrics.load_state_dict(
        {
            "count": torch.tensor([2**53 + 1]),
            "loss_sum": torch.tensor([2.0**30], dtype=torch.float64),
            "correct": torch.tensor([2**53]),
        }
    )
    metrics.update(torch.tensor([2.0**-20]), torch.tensor([0]), torch.tensor([1]))
    assert metrics.count.item() == 2**53 + 2
    assert metrics.correct.item() == 2**53 + 1
    assert metrics.loss_sum.item() == 2.0**30 + 2.0**-20


@given(first=STREAM, second=STREAM)
def test_merge_reset_and_state(
    first: list[tuple[int, float, bool]], second: list[tuple[int, float, bool]]
) -> None:
    a, b = ClassMetrics(CLASSES), ClassMetrics(CLASSES)
    a.update(*tensors(first))
    b.update(*tensors(second))
    resumed = ClassMetrics(CLASSES)
    resumed.update(*tensors(second))  # must be forgotten
    resumed.load_state_dict(a.state_dict())
    before = resumed.count
    a.merge(b)
    assert torch.equal(a.count, before + b.count)
    assert torch.equal(a.loss_sum, resumed.loss_sum + b.loss_sum)
    assert torch.equal(a.correct, resumed.correct + b.correct)
    resumed.update(*tensors(second))
    assert torch.equal(resumed.count, a.count)
    a.reset()
    assert a.count.sum() == a.loss_sum.sum() == a.correct.sum() == 0
    assert torch.equal(resumed.count, before + b.count)  # what was handed out stays


def test_any_shape_half_precision_and_another_ignored_index() -> None:
    metrics = ClassMetrics(3)
    loss = torch.full((2, 2, 2), 0.1, dtype=torch.bfloat16, requires_grad=True)
    metrics.update(loss, torch.tensor([[[0, 1], [2, 2]]] * 2), torch.ones(2, 2, 2), ignore_index=2)
    assert metrics.count.tolist() == [2, 2, 0]
    assert metrics.loss[0].item() == torch.tensor(0.1, dtype=torch.bfloat16).item()


@pytest.mark.parametrize("wrong", [-1, 3, 4, 10**12])
def test_a_target_that_is_no_class_is_named_and_changes_nothing(wrong: int) -> None:
    metrics = ClassMetrics(3)
    with pytest.raises(ValueError, match=f"target {wrong} is not a class; expected 0..2"):
        metrics.update(torch.ones(2), torch.tensor([0, wrong]), torch.ones(2))
    assert metrics.count.sum() == 0


def test_a_target_of_v_fails_even_unchecked_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frequency_bins.class_metrics._check_range", lambda target, num: None)
    with pytest.raises((IndexError, RuntimeError), match="index"):
        ClassMetrics(3).update(torch.ones(1), torch.tensor([3]), torch.ones(1))


def test_what_does_not_fit_is_named() -> None:
    metrics = ClassMetrics(3)
    with pytest.raises(ValueError, match="num_classes is 0"):
        ClassMetrics(0)
    with pytest.raises(ValueError, match="4 classes; expected 3"):
        metrics.merge(ClassMetrics(4))
    with pytest.raises(ValueError, match="count has 4 classes"):
        metrics.load_state_dict(ClassMetrics(4).state_dict())
    with pytest.raises(ValueError, match="expected"):
        metrics.load_state_dict({"count": metrics.count})
    with pytest.raises(ValueError, match="float32"):
        metrics.load_state_dict(metrics.state_dict() | {"loss_sum": torch.zeros(3)})
