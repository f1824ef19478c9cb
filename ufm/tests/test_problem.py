from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ufm import UFMProblem
from ufm.problem import allocation


def test_counts_may_be_a_sequence_an_array_or_a_tensor():
    for counts in ([5, 2, 1], np.array([5, 2, 1]), torch.tensor([5.0, 2.0, 1.0])):
        problem = UFMProblem(class_counts=counts, lambda_W=1e-2, lambda_H=1e-2)
        assert problem.class_counts.tolist() == [5, 2, 1]
        assert problem.class_counts.dtype == torch.int64
        assert problem.num_samples == 8
        assert problem.feature_width == 3
        assert problem.mass.dtype == torch.float64


def test_loss_weights_are_scaled_to_keep_the_number_of_samples():
    problem = UFMProblem(
        class_counts=[6, 3, 1], lambda_W=1e-2, lambda_H=1e-2, loss_weights=[1, 2, 4]
    )
    assert float((problem.loss_weights * problem.class_counts).sum()) == pytest.approx(10)
    assert float(problem.mass.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("class_counts", [3, 0], "0"),
        ("class_counts", [3, -2], "-2"),
        ("class_counts", [3, 2.5], "2.5"),
        ("class_counts", [3, math.nan], "nan"),
        ("class_counts", [3], r"\(1,\)"),
        ("class_counts", ["a", "b"], "a"),
        ("class_counts", [[3, 2], [1]], "class_counts"),
        ("lambda_W", 0.0, "0.0"),
        ("lambda_W", -1e-3, "-0.001"),
        ("lambda_W", math.nan, "nan"),
        ("lambda_H", math.inf, "inf"),
        ("lambda_H", [1e-3, 1e-3, 1e-3], r"\(3,\)"),
        ("lambda_H", [1e-3, 0.0], "0.0"),
        ("lambda_W", 1e-250, "range of float64"),
        ("loss_weights", [1.0, -1.0], "-1"),
        ("loss_weights", [1.0, 1.0, 1.0], r"\(3,\)"),
        ("label_smoothing", 1.0, "1.0"),
        ("label_smoothing", -0.1, "-0.1"),
        ("loss", "hinge", "hinge"),
        ("width", 0, "0"),
        ("width", -3, "-3"),
        ("width", 2.5, r"2\.5"),
        ("class_counts", 7, r"shape \(\)"),
        ("lambda_W", "much", "much"),
    ],
)
def test_bad_values_are_named(field, value, named):
    good = {"class_counts": [3, 2], "lambda_W": 1e-3, "lambda_H": 1e-3}
    if field == "lambda_W" and value == 1e-250:
        good["lambda_H"] = 1e-250
    with pytest.raises(ValueError, match=named):
        UFMProblem(**(good | {field: value}))


def test_label_smoothing_needs_cross_entropy():
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1"):
        UFMProblem(
            class_counts=[3, 2], lambda_W=1e-3, lambda_H=1e-3, loss="mse", label_smoothing=0.1
        )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_running_out_of_memory_is_a_bad_value(error):
    with (
        pytest.raises(ValueError, match="the answer is too large to allocate"),
        allocation("the answer"),
    ):
        raise error


def test_other_errors_keep_their_kind():
    with pytest.raises(RuntimeError, match="something else"), allocation("the answer"):
        raise RuntimeError("something else")
