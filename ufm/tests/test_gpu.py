"""What the package computes on a GPU, on a fake one: no devices mixed, and the CPU's answers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from run_store.tests.fake_gpu import GPU, fake_gpu
from ufm import UFMProblem, certify, closed_form, neural_collapse, solve, solve_batch

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "loss weights": {"loss_weights": [1.0, 1.5, 2.0, 3.0]},
    "class decay": {"lambda_H": [5e-3, 9e-3, 5e-3, 7e-3]},
    "row decay": {"lambda_W": [5e-3, 9e-3, 5e-3, 7e-3]},
    "label smoothing": {"label_smoothing": 0.1},
    "mse": {"loss": "mse"},
    "bias": {"bias": True},
    "free features": {"nonnegative": False},
    "narrow": {"width": 2},
}


def problem(**changes: Any) -> UFMProblem:
    given = {"class_counts": [20, 8, 3, 1], "lambda_W": 5e-3, "lambda_H": 5e-3}
    return UFMProblem(**(given | changes))


def assert_same(there: object, here: object) -> None:
    """Equal in every field, to the last bit, and there on the GPU."""
    for field in fields(here):  # type: ignore[arg-type]
        one, other = getattr(there, field.name), getattr(here, field.name)
        if isinstance(other, Tensor):
            assert one.device == GPU, field.name
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)
        elif isinstance(other, float):
            assert one == pytest.approx(other, abs=0, nan_ok=True), field.name


@pytest.mark.parametrize(
    ("name", "per_sample"), [*((name, False) for name in VARIANTS), ("loss weights", True)]
)
def test_solving_and_certifying(name: str, per_sample: bool) -> None:
    # `replace` normalises loss weights once more, as moving does: another last bit.
    here = solve(problem(**VARIANTS[name]).replace(), per_sample=per_sample, throw=False)
    with fake_gpu():
        there = solve(problem(**VARIANTS[name]), per_sample=per_sample, throw=False, device=GPU)
        assert there.status == here.status
        assert_same(there, here)
        assert_same(there.certificate, here.certificate)
        assert_same(certify(there.problem, there.W, there.H, bias=there.bias), here.certificate)
        if not per_sample:
            collapse = neural_collapse(there.problem, there.W, there.H)
            assert_same(collapse, neural_collapse(here.problem, here.W, here.H))


@pytest.mark.parametrize("name", ["plain", "loss weights", "class decay", "label smoothing", "mse"])
def test_the_closed_form(name: str) -> None:
    here = closed_form(problem(**VARIANTS[name]).replace())
    with fake_gpu():
        there = closed_form(problem(**VARIANTS[name]).to(GPU))
        assert_same(there, here)


def test_a_batch() -> None:
    strengths = torch.logspace(-4, -2, 7).tolist()
    here = solve_batch([problem(lambda_W=strength) for strength in strengths])
    with fake_gpu():
        there = solve_batch([problem(lambda_W=s) for s in strengths], device=GPU)
        for one, other in zip(there, here, strict=True):
            assert one.status == other.status == "certified"
            assert_same(one, other)
