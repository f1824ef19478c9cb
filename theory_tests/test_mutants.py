"""A quick version of `python -m theory_tests.mutants`: every mutant, a few fixed problems, one
check each of what the suite checks at length."""

from __future__ import annotations

import math
import types

import pytest
import torch

from theory_tests.mutants import CLOSED_FORM, LAW, MUTANTS, PROBLEM, REPAIR, Mutant
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
    UFMProblem(class_counts=[5, 500, 60, 1], **DECAY, feature_sharing=0.5),
)
TOO_NARROW = UFMProblem(class_counts=[5, 500, 60, 1], width=2, **DECAY)


def load(mutant: Mutant) -> types.ModuleType:
    module = types.ModuleType(f"ufm.{mutant.target.stem}")
    exec(compile(mutant.source(), str(mutant.target), "exec"), module.__dict__)
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


def closed_form_holds(module: types.ModuleType) -> bool:
    try:
        module.closed_form(TOO_NARROW)
    except ValueError:
        pass
    else:
        return False
    try:
        return all(is_stationary(module.closed_form(p), p) for p in PROBLEMS)
    except (RuntimeError, ValueError):
        return False


def problem_holds(module: types.ModuleType) -> bool:
    """n = 4 and s = 1/2 halve the decay, in a batch and in its parts too."""
    problem = module.UFMProblem(class_counts=[[4, 1]], **DECAY, feature_sharing=0.5)
    parts = (problem, problem.flattened(), problem.take(torch.tensor([0])))
    halved = torch.tensor([[2.5e-3, 5e-3]], dtype=torch.float64)
    return all(torch.allclose(part.feature_decay, halved, rtol=1e-12, atol=0) for part in parts)


def law_holds(module: types.ModuleType) -> bool:
    """u = 9/10 n_c/n at s = 1 and V = 10, n_c = 2."""
    counts, losses = [9, 18, 180], [-math.log(1 - 1.8 / n) for n in (9, 18, 180)]
    fit = module.fit_critical_count(counts, losses, vocab_size=10, feature_sharing=1.0)
    again = fit.loss(counts).tolist()
    return [fit.critical_count, *again] == pytest.approx([2.0, *losses], rel=1e-12)


def repair_holds(module: types.ModuleType) -> bool:
    """ufm/THEORY.md, section 6, at s = 1."""
    goals = ("average", "equal", "balanced")
    return [module.repair_exponent(goal, 1.0) for goal in goals] == [0.5, 1.0, 1.0]


HOLDS = {
    CLOSED_FORM: closed_form_holds,
    PROBLEM: problem_holds,
    LAW: law_holds,
    REPAIR: repair_holds,
}


@pytest.mark.parametrize("target", HOLDS, ids=str)
def test_the_original_passes(target):
    unchanged = "from __future__ import annotations"
    assert HOLDS[target](load(Mutant("nothing", unchanged, unchanged, target)))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_is_caught(mutant):
    assert not HOLDS[mutant.target](load(mutant))
