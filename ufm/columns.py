"""The finish with one axis a column: a convex problem a column, solved by Newton's method.

Where every column of B has an axis of its own, |a|^2/2 + b^2/2 at its least is |z|, z = a b, and F
falls apart into

    min over z of  mass loss(scale z) + |z|,

one problem of V numbers a column. The Hessian is a diagonal less two rank-one terms, so a Newton
step costs O(V). Whether such a factorisation is optimal is not for this file to say: the
certificate does.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ufm.scaled import ScaledProblem

NEWTON_STEPS = 80
LOGIT_STEP = 4.0
BACKTRACKS = 40


def finish_columns(
    problem: ScaledProblem, start: Float[Tensor, "b V C"]
) -> tuple[Float[Tensor, "b V C"], Float[Tensor, " b"]]:
    """The minimiser z of every column, and F there. `start`: (A B), any values."""
    z = torch.empty_like(start)
    value = torch.zeros_like(problem.mass[:, 0])
    for where in problem.chunks():
        z[:, :, where], cost = _solve(problem, where, start[:, :, where])
        value = value + cost.sum(1)
    return z, value


def _solve(
    problem: ScaledProblem, where: slice, start: Float[Tensor, "b V c"]
) -> tuple[Float[Tensor, "b V c"], Float[Tensor, "b c"]]:
    scale = problem.row.unsqueeze(2) * problem.col[:, None, where]
    mass = problem.mass[:, None, where]
    zero_loss, zero_slope = problem.losses(torch.zeros_like(start), where)
    pull = -mass * scale * zero_slope
    pulled = pull.norm(dim=1, keepdim=True)
    # z = 0 is the minimiser iff |g| <= 1 there. Elsewhere every point below the cost of zero keeps
    # Newton's method away from the kink at zero, for the cost is convex.
    active = pulled > 1.0
    zero_cost = problem.mass[:, where] * zero_loss
    z = _ray_start(problem, scale, mass, pull / pulled.clamp(min=1e-300), pulled)
    cost, gradient = _value(problem, where, z, scale, mass)
    given = torch.where(start.norm(dim=1, keepdim=True) > 0, start, z)
    given_cost, given_gradient = _value(problem, where, given, scale, mass)
    better = (given_cost < torch.minimum(cost, zero_cost)).unsqueeze(1)
    z, gradient = torch.where(better, given, z), torch.where(better, given_gradient, gradient)
    cost = torch.minimum(cost, torch.where(better.squeeze(1), given_cost, cost))
    todo = active.squeeze(1)
    for _ in range(NEWTON_STEPS):
        if not bool(todo.any()):
            break
        step = _newton_step(problem, z, gradient, scale, mass)
        z, cost, gradient, todo = _move(problem, where, z, cost, gradient, step, todo, scale, mass)
    z = torch.where(active, z, 0.0)
    return z, torch.where(active.squeeze(1), cost, zero_cost)


def _ray_start(
    problem: ScaledProblem,
    scale: Float[Tensor, "b V c"],
    mass: Float[Tensor, "b 1 c"],
    unit: Float[Tensor, "b V c"],
    pulled: Float[Tensor, "b 1 c"],
) -> Float[Tensor, "b V c"]:
    """The quadratic model's minimiser along the steepest way out of zero, at most a nat away."""
    along = scale * unit
    if problem.mse:
        bend = mass * along.square().sum(1, keepdim=True)
    else:
        bend = mass * (along - along.mean(1, keepdim=True)).square().mean(1, keepdim=True)
    length = (pulled - 1.0) / bend.clamp(min=1e-300)
    nat = 1.0 / along.abs().amax(1, keepdim=True).clamp(min=1e-300)
    return unit * torch.minimum(length, nat).clamp(min=1e-300)


def _value(
    problem: ScaledProblem,
    where: slice,
    z: Float[Tensor, "b V c"],
    scale: Float[Tensor, "b V c"],
    mass: Float[Tensor, "b 1 c"],
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b V c"]]:
    loss, slope = problem.losses(scale * z, where)
    norm = z.norm(dim=1, keepdim=True)
    return mass.squeeze(1) * loss + norm.squeeze(1), mass * scale * slope + z / norm


def _newton_step(
    problem: ScaledProblem,
    z: Float[Tensor, "b V c"],
    gradient: Float[Tensor, "b V c"],
    scale: Float[Tensor, "b V c"],
    mass: Float[Tensor, "b 1 c"],
) -> Float[Tensor, "b V c"]:
    """-Hessian^-1 gradient, by Woodbury on the diagonal D and the two rank-one terms u, v."""
    norm = z.norm(dim=1, keepdim=True)
    v = z / norm / norm.sqrt()
    if problem.mse:
        D, u = mass * scale.square() + 1.0 / norm, torch.zeros_like(z)
    else:
        P = torch.softmax(scale * z, 1)
        D = mass * scale.square() * P + 1.0 / norm
        u = mass.sqrt() * scale * P
    Dg, Du, Dv = gradient / D, u / D, v / D
    uu, uv, vv = (u * Du).sum(1), (u * Dv).sum(1), (v * Dv).sum(1)
    ug, vg = (u * Dg).sum(1), (v * Dg).sum(1)
    determinant = (1.0 - uu) * (1.0 - vv) - uv.square()
    determinant = determinant.clamp(min=1e-30)
    a = ((1.0 - vv) * ug + uv * vg) / determinant
    b = (uv * ug + (1.0 - uu) * vg) / determinant
    step = -(Dg + a.unsqueeze(1) * Du + b.unsqueeze(1) * Dv)
    downhill = (step * gradient).sum(1, keepdim=True) < 0
    step = torch.where(downhill, step, -gradient)
    # A log-loss is close to its quadratic model over a few nats only; far out, over a share.
    reach = (scale * z).abs().amax(1, keepdim=True).mul(0.5).clamp(min=LOGIT_STEP)
    return step * (reach / (scale * step).abs().amax(1, keepdim=True)).clamp(max=1.0)


def _move(
    problem: ScaledProblem,
    where: slice,
    z: Float[Tensor, "b V c"],
    cost: Float[Tensor, "b c"],
    gradient: Float[Tensor, "b V c"],
    step: Float[Tensor, "b V c"],
    todo: Bool[Tensor, "b c"],
    scale: Float[Tensor, "b V c"],
    mass: Float[Tensor, "b 1 c"],
) -> tuple[Float[Tensor, "b V c"], Float[Tensor, "b c"], Float[Tensor, "b V c"], Tensor]:
    """Backtrack each column on its own; a column is done when no step lowers its gradient."""
    promised = (step * gradient).sum(1)
    length = torch.ones_like(cost)
    waiting = todo.clone()
    size = gradient.norm(dim=1)
    for _ in range(BACKTRACKS):
        trial = z + length.unsqueeze(1) * step
        trial_cost, trial_gradient = _value(problem, where, trial, scale, mass)
        # Close to the minimum the cost is flat to rounding; the gradient then decides.
        flat = (trial_cost <= cost + 1e-14 * cost.abs()) & (trial_gradient.norm(dim=1) < size)
        good = waiting & ((trial_cost <= cost + 1e-4 * length * promised) | flat)
        chosen = good.unsqueeze(1)
        z, gradient = torch.where(chosen, trial, z), torch.where(chosen, trial_gradient, gradient)
        cost = torch.where(good, trial_cost, cost)
        waiting = waiting & ~good
        if not bool(waiting.any()):
            break
        length = torch.where(waiting, 0.4 * length, length)
    done = waiting | (gradient.norm(dim=1) < 1e-15) | (gradient.norm(dim=1) >= size) & (size < 1e-9)
    return z, cost, gradient, todo & ~done
