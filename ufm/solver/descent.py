"""Batched projected L-BFGS: every problem of the batch with its own step length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ufm.solver.scaled import Point, ScaledProblem

MEMORY = 8
ARMIJO = 1e-4
BACKTRACKS = 15
FLAT = 1e-15
"""Relative decrease of F below which a step has met the rounding of F."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Descent:
    """Where a descent ended."""

    at: Point
    value: Float[Tensor, " b"]
    gradient: Point
    iterations: int
    evaluations: int
    """Evaluations of F and its gradient, those of a part of the batch counted whole."""


def bounded(problem: ScaledProblem, at: Point) -> Bool[Tensor, " n"]:
    """Which entries of the flat point are held at >= 0."""
    mask = torch.zeros(at.flat().shape[1], dtype=torch.bool, device=at.A.device)
    if problem.nonnegative:
        start = at.A[0].numel()
        mask[start : start + at.B[0].numel()] = True
    return mask


def free_entries(
    x: Float[Tensor, "b n"], gradient: Float[Tensor, "b n"], bounds: Bool[Tensor, " n"]
) -> Float[Tensor, "b n"]:
    """1 where an entry may move downhill: not at its bound with the gradient pushing out."""
    return (~(bounds & (x <= 0) & (gradient >= 0))).to(x.dtype)


def descend(problem: ScaledProblem, start: Point, *, iterations: int, floor: float) -> Descent:
    """Projected L-BFGS from `start`: at most `iterations` steps.

    A problem stops moving when its projected gradient falls to `floor` or no step lowers F.
    Two-metric projection: the quasi-Newton direction is taken among the free entries only, the
    step is projected, and Armijo's rule is checked on the projected step.
    """
    bounds = bounded(problem, start)
    x = start.flat()
    value, gradient = problem.value_and_gradient(start)
    g = gradient.flat()
    history: list[tuple[Tensor, Tensor, Tensor]] = []
    live = torch.ones_like(value, dtype=torch.bool)
    steps, evaluations = 0, 1
    for _ in range(iterations):
        free = free_entries(x, g, bounds)
        live &= (g * free).norm(dim=1) > floor
        if not bool(live.any()):
            break
        steps += 1
        direction = _direction(history, g, free)
        new_x, new_value, new_g, moved, tries = _line_search(
            problem, start, x, value, g, direction, live, bounds
        )
        evaluations += tries
        live &= moved & (value - new_value > FLAT * value.abs())
        _remember(history, new_x - x, new_g - g)
        x, value, g = new_x, new_value, new_g
    return Descent(
        at=start.like(x),
        value=value,
        gradient=start.like(g),
        iterations=steps,
        evaluations=evaluations,
    )


def _direction(
    history: list[tuple[Tensor, Tensor, Tensor]],
    g: Float[Tensor, "b n"],
    free: Float[Tensor, "b n"],
) -> Float[Tensor, "b n"]:
    """Two-loop recursion on the free entries; steepest descent where it does not point down."""
    steepest = g * free
    q = steepest.clone()
    factors = []
    for s, y, inverse in reversed(history):
        factor = inverse * (s * q).sum(1)
        q.addcmul_(factor.unsqueeze(1), y, value=-1.0)
        factors.append(factor)
    if history:
        s, y, inverse = history[-1]
        curvature = (y * y).sum(1) * inverse
        q *= torch.where(inverse > 0, 1.0 / curvature.clamp(min=1e-35), 1.0).unsqueeze(1)
    else:
        q /= steepest.norm(dim=1, keepdim=True).clamp(min=1.0)
    for (s, y, inverse), factor in zip(history, reversed(factors), strict=True):
        q.addcmul_((factor - inverse * (y * q).sum(1)).unsqueeze(1), s)
    q *= free
    down = (q * steepest).sum(1) > 1e-10 * q.norm(dim=1) * steepest.norm(dim=1)
    return torch.where(down.unsqueeze(1), -q, -steepest)


def _remember(
    history: list[tuple[Tensor, Tensor, Tensor]],
    s: Float[Tensor, "b n"],
    y: Float[Tensor, "b n"],
) -> None:
    """Keep the pair; problems whose pair has no positive curvature get a weight of zero."""
    curvature, size = (s * y).sum(1), (y * y).sum(1)
    good = curvature > 1e-12 * size
    inverse = torch.where(good, 1.0 / torch.where(good, curvature, 1.0), 0.0)
    history.append((s, y, inverse))
    del history[:-MEMORY]


def _line_search(
    problem: ScaledProblem,
    shape: Point,
    x: Float[Tensor, "b n"],
    value: Float[Tensor, " b"],
    g: Float[Tensor, "b n"],
    direction: Float[Tensor, "b n"],
    live: Bool[Tensor, " b"],
    bounds: Bool[Tensor, " n"],
) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, " b"], int]:
    """Backtracking along the projected path, each problem with its own step."""
    new_x, new_value, new_g = x.clone(), value.clone(), g.clone()
    todo = live.nonzero().squeeze(1)
    step = torch.ones(len(todo), 1, dtype=x.dtype, device=x.device)
    tries = 0
    for tries in range(1, BACKTRACKS + 1):
        whole = len(todo) == len(x)
        here, base, slope = (x, value, g) if whole else (x[todo], value[todo], g[todo])
        trial = here + step * (direction if whole else direction[todo])
        trial = torch.where(bounds, trial.clamp(min=0.0), trial)
        part = problem if whole else problem.take(todo)
        trial_value, trial_gradient = part.value_and_gradient(shape.like(trial))
        promised = ((trial - here) * slope).sum(1)
        good = trial_value <= base + ARMIJO * promised
        if whole and bool(good.all()):
            return trial, trial_value, trial_gradient.flat(), good, tries
        kept = todo[good]
        new_x[kept], new_value[kept] = trial[good], trial_value[good]
        new_g[kept] = trial_gradient.flat()[good]
        todo, step = todo[~good], 0.4 * step[~good]
        if len(todo) == 0:
            break
    moved = live.clone()
    moved[todo] = False
    return new_x, new_value, new_g, moved, tries
