"""Hypothesis strategies for UFM problems; importable by anyone who tests against the theory."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ufm import UFMProblem

LARGEST_COUNT = 100_000


def class_counts(min_classes: int = 2, max_classes: int = 12) -> st.SearchStrategy[list[int]]:
    """Balanced, step, exponential, Zipf and arbitrary class counts from 1 to 1e5."""
    return st.integers(min_classes, max_classes).flatmap(_counts_of)


def _counts_of(classes: int) -> st.SearchStrategy[list[int]]:
    count = st.integers(1, LARGEST_COUNT)
    ratio = st.floats(1.0, 1e5)

    def profile(values: list[float]) -> list[int]:
        return [max(1, round(value)) for value in values]

    def step(head: int, major: int, minor: int) -> list[int]:
        return [major] * head + [minor] * (classes - head)

    def exponential(major: int, imbalance: float) -> list[int]:
        return profile([major * imbalance ** (-k / (classes - 1)) for k in range(classes)])

    def zipf(major: int, exponent: float) -> list[int]:
        return profile([major / (k + 1) ** exponent for k in range(classes)])

    return st.one_of(
        st.builds(lambda n: [n] * classes, count),
        st.builds(step, st.integers(1, classes - 1), count, count),
        st.builds(exponential, count, ratio),
        st.builds(zipf, count, st.floats(0.5, 2.0)),
        st.lists(count, min_size=classes, max_size=classes),
    )


def sharings() -> st.SearchStrategy[float]:
    """feature_sharing: the paper's 0, the 1 of decayed weights, and what lies between."""
    return st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.0, 1.0))


@st.composite
def problems(draw: st.DrawFn, min_classes: int = 2, max_classes: int = 12) -> UFMProblem:
    """A plain problem, features shared or not, whose critical count lies anywhere from far below
    the rarest class to above the most frequent one, at any ratio of lambda_W to lambda_H."""
    counts = draw(class_counts(min_classes, max_classes))
    low, high = math.log(min(counts)) - 9.0, math.log(max(counts)) + 0.5
    critical = math.exp(draw(st.floats(low, high)))
    ratio = math.exp(draw(st.floats(-4.0, 4.0)))
    return with_critical_count(counts, critical, ratio=ratio, feature_sharing=draw(sharings()))


@st.composite
def threshold_problems(draw: st.DrawFn) -> tuple[UFMProblem, UFMProblem, int]:
    """Two problems whose critical counts lie just below and just above the count of one class."""
    counts = draw(class_counts())
    index = draw(st.integers(0, len(counts) - 1))
    shift = math.exp(draw(st.floats(-18.0, -5.0)))
    ratio = math.exp(draw(st.floats(-2.0, 2.0)))
    fields = {"ratio": ratio, "feature_sharing": draw(sharings())}
    below = with_critical_count(counts, counts[index] * (1 - shift), **fields)
    above = with_critical_count(counts, counts[index] * (1 + shift), **fields)
    return below, above, index


@st.composite
def variants(draw: st.DrawFn, max_classes: int = 8) -> UFMProblem:
    """A problem with loss weights, per-class lambda_H, label smoothing or MSE."""
    plain = draw(problems(max_classes=max_classes))
    V = plain.num_classes
    positive = st.lists(st.floats(0.1, 10.0), min_size=V, max_size=V)
    changes: dict[str, Any] = {}
    if draw(st.booleans()):
        changes["loss_weights"] = draw(positive)
    if draw(st.booleans()):
        changes["lambda_H"] = [plain.lambda_H * factor for factor in draw(positive)]
    if draw(st.booleans()):
        changes["loss"] = "mse"
    elif draw(st.booleans()):
        changes["label_smoothing"] = draw(st.floats(0.0, 0.5))
    return changed(plain, **changes)


@st.composite
def candidates(draw: st.DrawFn, problem: UFMProblem) -> tuple[Tensor, Tensor]:
    """Some (W, H), random or near the minimum, one feature a class or one a sample."""
    width = draw(st.integers(1, problem.num_classes + 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = math.exp(draw(st.floats(-6.0, 4.0)))
    columns = problem.num_classes
    if int(problem.num_samples) <= 200 and draw(st.booleans()):
        columns = int(problem.num_samples)
    W = torch.randn(problem.num_classes, width, generator=generator, dtype=torch.float64)
    H = torch.rand(width, columns, generator=generator, dtype=torch.float64)
    return scale * W, scale * H


def with_critical_count(
    counts: list[int],
    critical_count: float,
    *,
    ratio: float = 1.0,
    feature_sharing: float = 0.0,
    **fields: Any,
) -> UFMProblem:
    """The problem with these counts, this n_c and lambda_W / lambda_H = ratio."""
    V, N = len(counts), sum(counts)
    geometric = critical_count ** ((1 + feature_sharing) / 2) * math.sqrt((V - 1) / V) / N
    return UFMProblem(
        class_counts=counts,
        lambda_W=geometric * math.sqrt(ratio),
        lambda_H=geometric / math.sqrt(ratio),
        feature_sharing=feature_sharing,
        **fields,
    )


def changed(problem: UFMProblem, **changes: Any) -> UFMProblem:
    """`problem` with some fields replaced."""
    fields = {name: getattr(problem, name) for name in problem.__dataclass_fields__}
    return UFMProblem(**(fields | changes))
