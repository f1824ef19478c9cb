"""The UFM in the scaled variables of ufm/THEORY.md, section 3, as every part of the solver sees it.

A = sqrt(lambda_W) W (row by row) and B_c = sqrt(lambda_H n_k) h_c, so that both decay terms become
|A|^2 / 2 + |B|^2 / 2 and the logits are row_j col_c (A B)_jc (+ bias). Columns c are classes, or
samples where each has a feature of its own. Leading dimension: the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ufm.certificate import sample_labels
from ufm.problem import UFMProblem

CHUNK_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}
"""Numbers in one block of logits: what a CPU's cache keeps, what fills a GPU."""
SMALLEST_CHUNK = 64
"""Columns of one block at least: with fewer, a product with A only waits for A."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """A candidate: A (b, V, d), B (b, d, C) and the bias (b, V), all zero without one."""

    A: Float[Tensor, "b V d"]
    B: Float[Tensor, "b d C"]
    bias: Float[Tensor, "b V"]

    def flat(self) -> Float[Tensor, "b n"]:
        """One row a problem."""
        return torch.cat([self.A.flatten(1), self.B.flatten(1), self.bias], 1)

    def like(self, flat: Float[Tensor, "b n"]) -> Point:
        """The inverse of `flat`, with this point's shapes."""
        size_A, size_B = self.A[0].numel(), self.B[0].numel()
        A, B = flat[:, :size_A], flat[:, size_A : size_A + size_B]
        return Point(
            A=A.reshape(-1, *self.A.shape[1:]),
            B=B.reshape(-1, *self.B.shape[1:]),
            bias=flat[:, size_A + size_B :],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledProblem:
    """A flat batch of problems with the same V, C and switches."""

    mass: Float[Tensor, "b C"]
    row: Float[Tensor, "b V"]
    col: Float[Tensor, "b C"]
    label: Int[Tensor, C]
    smoothing: float
    mse: bool
    nonnegative: bool
    bias: bool

    @classmethod
    def of(cls, problem: UFMProblem, *, per_sample: bool, dtype: torch.dtype) -> ScaledProblem:
        """Of a problem with exactly one batch dimension."""
        counts, mass, decay = problem.counts, problem.mass, problem.feature_decay
        if per_sample:
            label = sample_labels(problem)
            mass, col = (mass / counts)[:, label], decay[:, label].rsqrt()
        else:
            label = torch.arange(problem.num_classes, device=counts.device)
            col = (decay * counts).rsqrt()
        return cls(
            mass=mass.to(dtype),
            row=problem.row_decay.rsqrt().to(dtype),
            col=col.to(dtype),
            label=label,
            smoothing=problem.label_smoothing,
            mse=problem.loss == "mse",
            nonnegative=problem.nonnegative,
            bias=problem.bias,
        )

    def take(self, index: Tensor) -> ScaledProblem:
        """The problems at `index` of the batch."""
        return ScaledProblem(
            mass=self.mass[index],
            row=self.row[index],
            col=self.col[index],
            label=self.label,
            smoothing=self.smoothing,
            mse=self.mse,
            nonnegative=self.nonnegative,
            bias=self.bias,
        )

    def chunks(self) -> list[slice]:
        """Column ranges small enough that (b, V, columns) stays within CHUNK_ELEMENTS."""
        batch, columns = self.mass.shape
        elements = CHUNK_ELEMENTS.get(self.mass.device.type, CHUNK_ELEMENTS["cuda"])
        size = max(1, elements // (batch * self.row.shape[1]), SMALLEST_CHUNK // batch)
        return [slice(i, min(i + size, columns)) for i in range(0, columns, size)]

    def value_and_gradient(self, at: Point) -> tuple[Float[Tensor, " b"], Point]:
        """F and its gradient."""
        A, B = at.A, at.B
        value = 0.5 * (A.square().sum((1, 2)) + B.square().sum((1, 2)))
        grad_A, grad_B, grad_bias = A.clone(), torch.empty_like(B), torch.zeros_like(at.bias)
        for where in self.chunks():
            loss, G, slope = self._columns(at, where)
            value = value + (self.mass[:, where] * loss).sum(1)
            grad_A.baddbmm_(G, B[:, :, where].mT)
            grad_B[:, :, where] = torch.baddbmm(B[:, :, where], A.mT, G)
            if self.bias:
                grad_bias += slope.sum(2)
        return value, Point(A=grad_A, B=grad_B, bias=grad_bias)

    def _columns(
        self, at: Point, where: slice
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b V c"], Float[Tensor, "b V c"]]:
        """Loss, gradient in the scaled logits A B (-G of ufm/THEORY.md, section 3) and in the
        logits themselves."""
        scale = self.row.unsqueeze(2) * self.col[:, None, where]
        Z = torch.bmm(at.A, at.B[:, :, where]) * scale
        if self.bias:
            Z += at.bias.unsqueeze(2)
        loss, slope = logit_losses(Z, self.label[where], smoothing=self.smoothing, mse=self.mse)
        slope = slope * self.mass[:, None, where]
        return loss, slope * scale, slope

    def gradient_columns(self, at: Point) -> Float[Tensor, "b V C"]:
        """-G: the gradient in A B. Holds b V C numbers."""
        return torch.cat([self._columns(at, where)[1] for where in self.chunks()], 2)

    def hessian_product(self, at: Point, gradient: Float[Tensor, "b V C"], along: Point) -> Point:
        """Hessian of F at `at` times `along`; `gradient` is gradient_columns(at)."""
        A, B = at.A, at.B
        out_A = along.A + torch.bmm(gradient, along.B.mT)
        out_B = along.B + torch.bmm(along.A.mT, gradient)
        out_bias = torch.zeros_like(at.bias)
        for where in self.chunks():
            scale = self.row.unsqueeze(2) * self.col[:, None, where]
            Z = torch.bmm(A, B[:, :, where]) * scale + at.bias.unsqueeze(2)
            dZ = torch.bmm(along.A, B[:, :, where]).baddbmm_(A, along.B[:, :, where]) * scale
            dZ += along.bias.unsqueeze(2)
            if not self.mse:
                P = torch.softmax(Z, 1)
                dZ = P * (dZ - (P * dZ).sum(1, keepdim=True))
            dZ = dZ * self.mass[:, None, where]
            dG = dZ * scale
            out_A.baddbmm_(dG, B[:, :, where].mT)
            out_B[:, :, where] += torch.bmm(A.mT, dG)
            if self.bias:
                out_bias += dZ.sum(2)
        return Point(A=out_A, B=out_B, bias=out_bias)


def logit_losses(
    Z: Float[Tensor, "b V c"], label: Int[Tensor, " c"], *, smoothing: float, mse: bool
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b V c"]]:
    """Loss of each column of logits and its gradient in them.

    p_k - q_k keeps its digits at its own entry: minus the sum of the others, not p - 1.
    """
    index = label.expand(len(Z), 1, -1)
    own = Z.gather(1, index)
    if mse:
        slope = Z.scatter_add(1, index, torch.full_like(own, -1.0))
        return 0.5 * slope.square().sum(1), slope
    D = Z - own
    D.scatter_(1, index, -torch.inf)
    peak = D.amax(1, keepdim=True).clamp_(min=0.0)
    E = (D - peak).exp_()
    rest = E.sum(1, keepdim=True)
    total = (-peak).exp() + rest
    loss = torch.where(peak > 0, peak + total.log(), rest.log1p()).squeeze(1)
    E /= total
    miss = -rest / total
    if smoothing:
        V = Z.shape[1]
        loss = loss + smoothing * (own - Z.mean(1, keepdim=True)).squeeze(1)
        E -= smoothing / V
        miss = miss + smoothing * (V - 1) / V
    return loss, E.scatter_(1, index, miss)
