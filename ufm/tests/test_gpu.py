"""What the package computes on a GPU, on a fake one: no devices mixed, and the CPU's answers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from run_store.tests.fake_gpu import GPU, fake_gpu
from ufm import (
    Solution,
    UFMProblem,
    certify,
    closed_form,
    neural_collapse,
    solve,
    solve_batch,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "loss weights": {"loss_weights": [1.0, 1.5, 2.0, 3.0]},
    "class decay": {"lambda_H": [5e-3, 9e-3, 5e-3, 7e-3]},
    "shared features": {"feature_sharing": 0.5},
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


def assert_same(there: object, here: object, *, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    """Equal in every field but for rounding, and there on the GPU.

    What the minimum settles is as near as two searches are in test_solver.py. It leaves W, H and a
    bias open (axes may be turned, a bias shifted), and so their logits stand for them.
    """
    for field in fields(here):  # type: ignore[arg-type]
        one, other = getattr(there, field.name), getattr(here, field.name)
        if isinstance(other, Tensor):
            assert one.device == GPU, field.name
            if isinstance(here, Solution) and field.name in ("W", "H", "bias"):
                continue
            torch.testing.assert_close(one.cpu(), other, rtol=rtol, atol=atol, equal_nan=True)
        elif isinstance(other, float):
            assert one == pytest.approx(other, rel=rtol, abs=atol, nan_ok=True), field.name


def logits(solution: Solution) -> Tensor:
    """Less their mean over the classes, which a shift of the bias would change."""
    found = solution.W @ solution.H
    found = found if solution.bias is None else found + solution.bias.unsqueeze(-1)
    return (found - found.mean(-2, keepdim=True)).cpu()


@pytest.mark.parametrize(
    ("name", "per_sample"), [*((name, False) for name in VARIANTS), ("loss weights", True)]
)
def test_solving_and_certifying(name: str, per_sample: bool) -> None:
    here = solve(problem(**VARIANTS[name]), per_sample=per_sample, throw=False)
    with fake_gpu():
        there = solve(problem(**VARIANTS[name]), per_sample=per_sample, throw=False, device=GPU)
        assert there.status == here.status
        assert_same(there, here)
        torch.testing.assert_close(logits(there), logits(here), rtol=1e-8, atol=1e-8)
        assert_same(there.certificate, here.certificate)
        assert_same(certify(there.problem, there.W, there.H, bias=there.bias), here.certificate)
        if not per_sample:
            collapse = neural_collapse(there.problem, there.W, there.H)
            assert_same(collapse, neural_collapse(here.problem, here.W, here.H))


@pytest.mark.parametrize(
    "name", ["plain", "loss weights", "class decay", "shared features", "label smoothing", "mse"]
)
def test_the_closed_form(name: str) -> None:
    here = closed_form(problem(**VARIANTS[name]))
    with fake_gpu():
        there = closed_form(problem(**VARIANTS[name]).to(GPU))
        # Each within 3e-14 of the truth, as test_closed_form.py has it.
        assert_same(there, here, rtol=1e-13, atol=0.0)


def test_a_batch() -> None:
    strengths = torch.logspace(-4, -2, 7).tolist()
    here = solve_batch([problem(lambda_W=strength) for strength in strengths])
    with fake_gpu():
        there = solve_batch([problem(lambda_W=s) for s in strengths], device=GPU)
        for one, other in zip(there, here, strict=True):
            assert one.status == other.status == "certified"
            assert_same(one, other)
