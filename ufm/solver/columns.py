"""The finish with one axis a column: a convex problem a column, solved by Newton's method.

Where every column of B has an axis of its own, |a|^2/2 + b^2/2 at its least is |z|, z = a b, and F
falls apart into

    min over z of  mass loss(scale z) + |z|,

one problem of V numbers a column. The Hessian is a diagonal less two rank-one terms, so a Newton
step costs O(V). Whether such a factorisation is optimal is not for this file to say: the
certificate does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ufm.solver.scaled import ScaledProblem, logit_losses

NEWTON_STEPS = 100
LOGIT_STEP = 4.0
BACKTRACKS = 40
CONVERGED = 1e-15
NEARLY = 1e-9
"""Gradient below which a step that no longer lowers it ends a column: only rounding is left."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """M columns of any problems of a batch, side by side."""

    scale: Float[Tensor, "V M"]
    mass: Float[Tensor, " M"]
    label: Int[Tensor, " M"]
    smoothing: float
    mse: bool

    def take(self, index: Tensor) -> Columns:
        """The columns at `index`."""
        return Columns(
            scale=self.scale[:, index],
            mass=self.mass[index],
            label=self.label[index],
            smoothing=self.smoothing,
            mse=self.mse,
        )

    def loss(self, z: Float[Tensor, "V M"]) -> tuple[Float[Tensor, " M"], Float[Tensor, "V M"]]:
        """mass loss(scale z), and its gradient."""
        loss, slope = logit_losses(
            (self.scale * z).unsqueeze(0), self.label, smoothing=self.smoothing, mse=self.mse
        )
        return self.mass * loss[0], self.mass * self.scale * slope[0]

    def cost(self, z: Float[Tensor, "V M"]) -> tuple[Float[Tensor, " M"], Float[Tensor, "V M"]]:
        """mass loss(scale z) + |z| for z other than zero, and its gradient."""
        value, gradient = self.loss(z)
        norm = z.norm(dim=0)
        return value + norm, gradient + z / norm


def finish_columns(
    problem: ScaledProblem, A: Float[Tensor, "b V d"], B: Float[Tensor, "b d C"]
) -> tuple[Float[Tensor, "b V k"], Int[Tensor, " k"]]:
    """The minimiser z of every column, and which columns these are: those that are not zero in some
    problem of the batch. Starts at A B, which may be anything."""
    found, kept = [], []
    for where in problem.chunks():
        start = torch.bmm(A, B[:, :, where])
        batch, classes, columns = start.shape
        scale = problem.row.unsqueeze(2) * problem.col[:, None, where]
        side_by_side = Columns(
            scale=scale.transpose(0, 1).reshape(classes, -1),
            mass=problem.mass[:, where].reshape(-1),
            label=problem.label[where].repeat(batch),
            smoothing=problem.smoothing,
            mse=problem.mse,
        )
        z = _solve(side_by_side, start.transpose(0, 1).reshape(classes, -1))
        z = z.reshape(classes, batch, columns).transpose(0, 1)
        moved = (z != 0).any(1).any(0).nonzero().squeeze(1)
        found.append(z[:, :, moved])
        kept.append(moved + where.start)
    return torch.cat(found, 2), torch.cat(kept)


def _solve(columns: Columns, start: Float[Tensor, "V M"]) -> Float[Tensor, "V M"]:
    zero_cost, zero_slope = columns.loss(torch.zeros_like(start))
    pulled = zero_slope.norm(dim=0)
    # z = 0 is the minimiser iff |g| <= 1 there. Elsewhere every point below the cost of zero keeps
    # Newton's method away from the kink at zero, for the cost is convex.
    index = (pulled > 1.0).nonzero().squeeze(1)
    z = torch.zeros_like(start)
    if not len(index):
        return z
    part = columns.take(index)
    z[:, index] = _ray_start(part, -zero_slope[:, index] / pulled[index], pulled[index])
    ray_cost, _ = part.cost(z[:, index])
    given = torch.where(start[:, index].norm(dim=0) > 0, start[:, index], z[:, index])
    given_cost, _ = part.cost(given)
    better = given_cost < torch.minimum(ray_cost, zero_cost[index])
    z[:, index[better]] = given[:, better]
    for _ in range(NEWTON_STEPS):
        if not len(index):
            break
        index = _newton(columns, z, index)
    return z


def _ray_start(
    columns: Columns, unit: Float[Tensor, "V M"], pulled: Float[Tensor, " M"]
) -> Float[Tensor, "V M"]:
    """The quadratic model's minimiser along the steepest way out of zero, at most a nat away."""
    along = columns.scale * unit
    if columns.mse:
        bend = columns.mass * along.square().sum(0)
    else:
        bend = columns.mass * (along - along.mean(0)).square().mean(0)
    length = (pulled - 1.0) / bend.clamp(min=1e-35)
    nat = 1.0 / along.abs().amax(0).clamp(min=1e-35)
    return unit * torch.minimum(length, nat).clamp(min=1e-35)


def _newton(
    columns: Columns, z: Float[Tensor, "V M"], index: Int[Tensor, " m"]
) -> Int[Tensor, " m_left"]:
    """One step of the columns at `index`, in place; returns those that can still move."""
    here, part = z[:, index], columns.take(index)
    cost, gradient = part.cost(here)
    size = gradient.norm(dim=0)
    step = _newton_step(part, here, gradient)
    promised = (step * gradient).sum(0)
    waiting = torch.arange(len(index), device=index.device)
    ended = size <= CONVERGED
    length = 1.0
    for _ in range(BACKTRACKS):
        trial = here[:, waiting] + length * step[:, waiting]
        trial_cost, trial_gradient = part.take(waiting).cost(trial)
        trial_size = trial_gradient.norm(dim=0)
        base = cost[waiting]
        # Close to the minimum the cost is flat to rounding; the gradient then decides.
        flat = (trial_cost <= base * (1.0 + 1e-11)) & (trial_size < 0.9 * size[waiting])
        good = flat | (trial_cost <= base + 1e-4 * length * promised[waiting])
        z[:, index[waiting[good]]] = trial[:, good]
        ended[waiting[good]] |= (trial_size >= 0.9 * size[waiting])[good] & (
            size[waiting][good] < NEARLY
        )
        waiting = waiting[~good]
        if not len(waiting):
            break
        length *= 0.4
    ended[waiting] = True
    return index[~ended]


def _newton_step(
    columns: Columns, z: Float[Tensor, "V M"], gradient: Float[Tensor, "V M"]
) -> Float[Tensor, "V M"]:
    """-Hessian^-1 gradient, by Woodbury on the diagonal D and the two rank-one terms u, v."""
    norm = z.norm(dim=0)
    v = z / (norm * norm.sqrt())
    logits = columns.scale * z
    if columns.mse:
        D, u = columns.mass * columns.scale.square() + 1.0 / norm, torch.zeros_like(z)
    else:
        P = torch.softmax(logits, 0)
        u = columns.mass.sqrt() * columns.scale * P
        D = columns.mass * columns.scale.square() * P + 1.0 / norm
    Du, Dv = u / D, v / D
    uu, uv, vv = (u * Du).sum(0), (u * Dv).sum(0), (v * Dv).sum(0)
    ug, vg = (Du * gradient).sum(0), (Dv * gradient).sum(0)
    determinant = ((1.0 - uu) * (1.0 - vv) - uv.square()).clamp(min=1e-30)
    a = ((1.0 - vv) * ug + uv * vg) / determinant
    b = (uv * ug + (1.0 - uu) * vg) / determinant
    step = -(gradient / D + a * Du + b * Dv)
    step = torch.where((step * gradient).sum(0) < 0, step, -gradient)
    # A log-loss is close to its quadratic model over a few nats only; far out, over a share.
    reach = (0.5 * logits.abs().amax(0)).clamp(min=LOGIT_STEP)
    moved = (columns.scale * step).abs().amax(0).clamp(min=1e-35)
    return step * (reach / moved).clamp(max=1.0)
