"""Batched projected Newton-CG: the second-order finish where axes may be shared by columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ufm.solver.descent import bounded, free_entries
from ufm.solver.scaled import Point, ScaledProblem

CG_STEPS = 200
BACKTRACKS = 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Polish:
    """Where the finish ended, with the norm of the projected gradient there."""

    at: Point
    value: Float[Tensor, " b"]
    gradient_norm: Float[Tensor, " b"]
    iterations: int
    products: int
    """Hessian-vector products, for the whole batch at a time."""


def polish(problem: ScaledProblem, start: Point, *, steps: int, floor: float) -> Polish:
    """Newton steps on the free entries until the projected gradient is at most `floor`, or none
    helps. Entries close to their bound that are pushed out are held there (Bertsekas, 1982)."""
    bounds = bounded(problem, start)
    x = start.flat()
    value, gradient = problem.value_and_gradient(start)
    g = gradient.flat()
    live = torch.ones_like(value, dtype=torch.bool)
    taken = products = 0
    for _ in range(steps):
        size = (g * free_entries(x, g, bounds)).norm(dim=1)
        live &= size > floor
        if not bool(live.any()):
            break
        taken += 1
        near = (size * 1e-2).clamp(max=1e-4).unsqueeze(1)
        x = torch.where(bounds & (x <= near) & (g > 0) & live.unsqueeze(1), 0.0, x)
        value, gradient = problem.value_and_gradient(start.like(x))
        g = gradient.flat()
        free = free_entries(x, g, bounds)
        direction, used = _newton_direction(problem, start.like(x), g * free, free, live)
        products += used
        x, value, g, moved = _search(problem, start, x, value, g, direction, live, bounds)
        live &= moved
    return Polish(
        at=start.like(x),
        value=value,
        gradient_norm=(g * free_entries(x, g, bounds)).norm(dim=1),
        iterations=taken,
        products=products,
    )


def _newton_direction(
    problem: ScaledProblem,
    at: Point,
    g: Float[Tensor, "b n"],
    free: Float[Tensor, "b n"],
    live: Bool[Tensor, " b"],
) -> tuple[Float[Tensor, "b n"], int]:
    """Truncated conjugate gradients on the free entries; stops at negative curvature."""
    columns = problem.gradient_columns(at)

    def product(v: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        return problem.hessian_product(at, columns, at.like(v)).flat() * free

    return _conjugate_gradients(product, g, live)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], g: Float[Tensor, "b n"], live: Bool[Tensor, " b"]
) -> tuple[Float[Tensor, "b n"], int]:
    direction = torch.zeros_like(g)
    residual, conjugate = -g, -g
    size = g.square().sum(1)
    goal = size * size.sqrt().clamp(max=0.1) ** 2
    running = live & (size > 0)
    current = size
    used = 0
    for used in range(1, CG_STEPS + 1):
        image = product(conjugate)
        curvature = (conjugate * image).sum(1)
        good = running & (curvature > 1e-14 * conjugate.square().sum(1))
        if used == 1:
            direction = torch.where((running & ~good).unsqueeze(1), conjugate, direction)
        length = torch.where(good, current / torch.where(good, curvature, 1.0), 0.0).unsqueeze(1)
        direction = direction + length * conjugate
        residual = residual - length * image
        new = residual.square().sum(1)
        running = good & (new > goal)
        if not bool(running.any()):
            break
        ratio = torch.where(running, new / current.clamp(min=1e-35), 0.0).unsqueeze(1)
        conjugate = residual + ratio * conjugate
        current = new
    return direction, used


def _search(
    problem: ScaledProblem,
    shape: Point,
    x: Float[Tensor, "b n"],
    value: Float[Tensor, " b"],
    g: Float[Tensor, "b n"],
    direction: Float[Tensor, "b n"],
    live: Bool[Tensor, " b"],
    bounds: Bool[Tensor, " n"],
) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, " b"]]:
    """Backtrack along the projected path; where F is flat to rounding the gradient decides."""
    size = (g * free_entries(x, g, bounds)).norm(dim=1)
    waiting, length = live.clone(), torch.ones_like(value)
    new_x, new_value, new_g = x, value, g
    for _ in range(BACKTRACKS):
        trial = x + length.unsqueeze(1) * direction
        trial = torch.where(bounds, trial.clamp(min=0.0), trial)
        trial_value, trial_gradient = problem.value_and_gradient(shape.like(trial))
        trial_g = trial_gradient.flat()
        promised = ((trial - x) * g).sum(1)
        trial_size = (trial_g * free_entries(trial, trial_g, bounds)).norm(dim=1)
        flat = (trial_value <= value + 1e-13 * value.abs()) & (trial_size < 0.9 * size)
        good = waiting & ((trial_value <= value + 1e-4 * promised.clamp(max=0.0)) | flat)
        good &= (trial_value < value) | flat
        chosen = good.unsqueeze(1)
        new_x, new_g = torch.where(chosen, trial, new_x), torch.where(chosen, trial_g, new_g)
        new_value = torch.where(good, trial_value, new_value)
        waiting &= ~good
        if not bool(waiting.any()):
            break
        length = torch.where(waiting, 0.4 * length, length)
    return new_x, new_value, new_g, live & ~waiting
