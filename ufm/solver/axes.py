"""Merge and reseed: how the solver leaves the points where plain descent is trapped.

An axis is a column of A with its row of B, a rank-one piece a b' of the scaled logits. Descent
often spends several axes on what one could do and leaves a class without any: see ufm/THEORY.md,
section 7.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

COLLINEAR = 0.99
MERGE_ERROR = 0.05
DEAD = 1e-6
SEED_SIZE = 0.1


def merge_collinear(
    A: Float[Tensor, "V d"], B: Float[Tensor, "d C"]
) -> tuple[Float[Tensor, "V d"], Float[Tensor, "d C"]]:
    """Replace axes with collinear a or collinear b by one, which costs no more decay; its slot,
    and that of an axis of no size, becomes zero."""
    A, B = A.clone(), B.clone()
    size = A.norm(dim=0) * B.norm(dim=1)
    dead = size <= DEAD**2 * size.max()
    A[:, dead], B[dead] = 0.0, 0.0
    unit_A = A / A.norm(dim=0).clamp(min=1e-35)
    unit_B = B / B.norm(dim=1, keepdim=True).clamp(min=1e-35)
    alike = (unit_A.T @ unit_A > COLLINEAR) | (unit_B @ unit_B.T > COLLINEAR)
    waiting = ~dead
    for first in size.argsort(descending=True).tolist():
        if not waiting[first]:
            continue
        group = (alike[first] & waiting).nonzero().squeeze(1)
        waiting[group] = False
        if len(group) > 1:
            _merge_group(A, B, group, first)
    return A, B


def _merge_group(
    A: Float[Tensor, "V d"], B: Float[Tensor, "d C"], group: Tensor, keep: int
) -> None:
    """Put the nearest rank-one piece of the group's sum on axis `keep`, if it is near."""
    total = A[:, group] @ B[group]
    b = B[keep] / B[keep].norm()
    for _ in range(5):
        a = total @ b
        b = (total.T @ a).clamp(min=0.0)
        b = b / b.norm()
    a = total @ b
    if (total - torch.outer(a, b)).norm() > MERGE_ERROR * total.norm():
        return
    A[:, group], B[group] = 0.0, 0.0
    root = a.norm().sqrt()
    A[:, keep], B[keep] = a / root, b * root


def spectral_axes(
    A: Float[Tensor, "b V d"], B: Float[Tensor, "b d C"]
) -> tuple[Float[Tensor, "b V d"], Float[Tensor, "b d C"]]:
    """Free features: the axes with the same A B that cost least decay, its singular pairs."""
    left, size, right = torch.linalg.svd(A @ B, full_matrices=False)
    rank, width = size.shape[1], A.shape[2]
    kept = min(rank, width)
    root = size[:, :kept].sqrt()
    out_A, out_B = torch.zeros_like(A), torch.zeros_like(B)
    out_A[:, :, :kept] = left[:, :, :kept] * root.unsqueeze(1)
    out_B[:, :kept] = right[:, :kept] * root.unsqueeze(2)
    small = out_B.norm(dim=2) <= DEAD * out_B.norm(dim=2).amax(1, keepdim=True)
    return out_A.masked_fill(small.unsqueeze(1), 0.0), out_B.masked_fill(small.unsqueeze(2), 0.0)


def reseed(
    A: Float[Tensor, "V d"],
    B: Float[Tensor, "d C"],
    gradient: Float[Tensor, "V C"],
    label: Int[Tensor, " C"],
    *,
    nonnegative: bool,
) -> tuple[Float[Tensor, "V d"], Float[Tensor, "d C"], int]:
    """Start new axes, in empty slots, along directions b with |G b| > 1; also returns how many."""
    A, B = A.clone(), B.clone()
    empty = (A.norm(dim=0) * B.norm(dim=1) == 0).nonzero().squeeze(1).tolist()
    b = _candidates(gradient, label, nonnegative)
    pulled = -gradient @ b
    force = pulled.norm(dim=0)
    order = force.argsort(descending=True)
    order = order[force[order] > 1.0][: len(empty)].tolist()
    for slot, candidate in zip(empty, order, strict=False):
        A[:, slot] = SEED_SIZE * pulled[:, candidate] / force[candidate]
        B[slot] = SEED_SIZE * b[:, candidate]
    return A, B, len(order)


def _candidates(
    gradient: Float[Tensor, "V C"], label: Int[Tensor, " C"], nonnegative: bool
) -> Float[Tensor, "C seeds"]:
    """Unit directions b, one a class: a power step of max(G'G, 0) from its steepest column. With
    one column a class that is the class itself wherever the others do not pull along."""
    if not nonnegative:
        right: Tensor = torch.linalg.svd(gradient, full_matrices=False)[2]
        return right.T
    steep = gradient.norm(dim=0)
    peak = steep.new_zeros(gradient.shape[0]).scatter_reduce(0, label, steep, "amax")
    leaders = (steep == peak[label]).nonzero().squeeze(1)
    # The first of equal columns speaks for its class.
    first = torch.full((gradient.shape[0],), len(label), device=label.device)
    first = first.scatter_reduce(0, label[leaders], leaders, "amin")
    b = (gradient.T @ gradient[:, first]).clamp(min=0.0)
    unit: Tensor = b / b.norm(dim=0).clamp(min=1e-35)
    return unit
