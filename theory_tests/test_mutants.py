"""A quick version of `python -m theory_tests.mutants`: every mutant, three fixed problems, one
check each of what the suite checks at length."""

from __future__ import annotations

import types

import pytest
import torch

from theory_tests.mutants import MUTANTS, TARGET, Mutant
from ufm import UFMProblem
from ufm import closed_form as exact
from ufm.certificate import objective

DECAY = {"lambda_W": 2e-3, "lambda_H": 5e-3}
PROBLEMS = (
    UFMProblem(class_counts=[5, 500, 60, 1], **DECAY),
    UFMProblem(class_counts=[5, 500, 60, 1], width=3, **DECAY),
    UFMProblem(class_counts=[5, 500, 60, 1], **DECAY, loss="mse", loss_weights=[1, 2, 4, 3]),
    UFMProblem(
        class_counts=[5, 500, 60, 1], **DECAY, label_smoothing=0.2, loss_weights=[3, 1, 2, 4]
    ),
)
TOO_NARROW = UFMProblem(class_counts=[5, 500, 60, 1], width=2, **DECAY)


def load(mutant: Mutant) -> types.ModuleType:
    module = types.ModuleType("ufm.closed_form")
    exec(compile(mutant.source(), str(TARGET), "exec"), module.__dict__)
    return module


def is_stationary(result, problem: UFMProblem) -> bool:
    """Every number of a closed form against its own matrices and the first-order conditions."""
    W, H = result.W.clone().requires_grad_(), result.H.clone().requires_grad_()
    value = objective(problem, W, H)
    gradients = torch.autograd.grad(value, (W, H))
    agree = [
        (gradients[0], torch.zeros_like(W)),
        (gradients[1][H > 0], torch.zeros_like(gradients[1][H > 0])),
        (result.objective, value.detach()),
        (result.logits, result.W @ result.H),
        (result.weight_norm_sq, result.W.square().sum(1)),
        (result.feature_norm_sq, result.H.square().sum(0)),
    ]
    agree += [
        (getattr(result, name), getattr(exact(problem), name))
        for name in ("critical_count", "margin", "loss", "loss_slope")
    ]
    return all(torch.allclose(one, other, rtol=1e-9, atol=1e-10) for one, other in agree) and bool(
        torch.equal(result.collapsed, result.feature_norm_sq == 0)
    )


def is_caught(module: types.ModuleType) -> bool:
    try:
        module.closed_form(TOO_NARROW)
    except ValueError:
        pass
    else:
        return True
    try:
        return not all(is_stationary(module.closed_form(p), p) for p in PROBLEMS)
    except (RuntimeError, ValueError):
        return True


def test_the_original_passes():
    assert not is_caught(load(Mutant("nothing", "class ClosedForm:", "class ClosedForm:")))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_is_caught(mutant):
    assert is_caught(load(mutant))
