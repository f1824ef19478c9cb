"""The global minimum of the UFM in closed form (ufm/THEORY.md, sections 2 and 6), in float64.

Everything follows from y_k = sqrt(n_k / critical[k]): class k is active iff y_k > 1. critical[k]
carries the decays (what one sample of the class costs), the loss weights and the label smoothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ufm.problem import UFMProblem, check_allocation


@dataclass(frozen=True, kw_only=True, eq=False)
class ClosedForm:
    """The minimum of one problem, or of each problem of a batch; float64, leading batch dims.

    W, H and logits are built when asked for, so everything else costs O(V).
    """

    problem: UFMProblem
    critical_count: Float[Tensor, ...]
    """n_c: class k is learned iff n_k > n_c, y_k = (n_k / n_c)^((1 + feature_sharing) / 2). One
    number a problem, or one a class where loss_weights or lambda_H differ between the classes."""
    collapsed: Bool[Tensor, "*batch V"]
    """mu_k = 0: the class is not learned."""
    margin: Float[Tensor, "*batch V"]
    """M_k, the logit of class k less that of any other class, at a sample of class k."""
    loss: Float[Tensor, "*batch V"]
    """Loss of one sample of class k in nats (against the smoothed target where there is one)."""
    loss_slope: Float[Tensor, "*batch V"]
    """d loss_k / d sqrt(lambda_W lambda_H[k]) at a fixed ratio of the two; 0 where collapsed."""
    feature_norm_sq: Float[Tensor, "*batch V"]
    """|mu_k|^2."""
    weight_norm_sq: Float[Tensor, "*batch V"]
    """|w_k|^2."""
    objective: Float[Tensor, "*batch"]
    """F at the minimum, summed from its terms (not from the dual)."""

    @cached_property
    def logits(self) -> Float[Tensor, "*batch V V"]:
        """W @ H: column k holds the logits at a sample of class k. ValueError if too large."""
        classes = self.problem.num_classes
        _check_matrix("logits", self.problem, classes)
        every = torch.arange(classes, device=self.margin.device)
        return self.margin.unsqueeze(-2) * _directions(self.problem, every)

    @cached_property
    def W(self) -> Float[Tensor, "*batch V d"]:
        """A classifier of the minimum: one feature axis an active class, most margin first."""
        _check_matrix("W", self.problem, self.problem.feature_width)
        scale = torch.where(self.collapsed, 0.0, self.margin / self.feature_norm_sq.sqrt())
        served = self._served
        columns = _directions(self.problem, served) * scale.gather(-1, served).unsqueeze(-2)
        return _padded(columns, self.problem.feature_width, dim=-1)

    @cached_property
    def H(self) -> Float[Tensor, "*batch d V"]:
        """The class features mu_k of that minimum, one column a class."""
        _check_matrix("H", self.problem, self.problem.feature_width)
        served = self._served
        norms = self.feature_norm_sq.sqrt().gather(-1, served).unsqueeze(-1)
        rows = norms.new_zeros(*served.shape, self.problem.num_classes)
        rows = rows.scatter(-1, served.unsqueeze(-1), norms)
        return _padded(rows, self.problem.feature_width, dim=-2)

    @cached_property
    def _served(self) -> Int[Tensor, "*batch axes"]:
        """The class of each feature axis, active classes first."""
        order = torch.argsort(self.collapsed.to(torch.int8), dim=-1, stable=True)
        return order[..., : self.problem.feature_width]


def closed_form(problem: UFMProblem) -> ClosedForm:
    """The global minimum of `problem` in O(V) (ufm/THEORY.md, section 2; variants: section 6).

    M_k = log(1 + V (y_k - 1) / (1 + e y_k / (1 - e))), y_k = (n_k / n_c)^((1 + s) / 2) with s the
    feature_sharing; for e = 0 this is log((V-1)(r_k - 1)), written so that nothing cancels at the
    threshold or at large V.
    loss_k = log(1 + (V-1) e^-M_k) + e (V-1)/V M_k. MSE: W mu_k = (1 - 1/y_k) e_k.

    Raises ValueError where no closed form is known: row-wise lambda_W, a bias, free features under
    cross-entropy, or a width below the number of active classes.
    """
    _check_covered(problem)
    counts = problem.counts
    critical = _critical_count(problem)
    collapsed = counts <= critical
    excess = ((counts - critical) / critical).clamp(min=0.0)
    y = (1.0 + excess).sqrt()
    y_minus_1 = excess / (1.0 + y)
    if problem.loss == "mse":
        margin, loss, slope = _mse_terms(y, y_minus_1, collapsed)
    else:
        margin, loss, slope = _cross_entropy_terms(problem, y, y_minus_1, collapsed)
    _check_width(problem, collapsed)
    decay_W, decay_H = problem.row_decay, problem.feature_decay
    gauge = (decay_W * decay_H * counts).sqrt()
    direction_norm = 1.0 if problem.loss == "mse" else math.sqrt(_off(problem) / _V(problem))
    # Each active class is one rank-one term of W H; its nuclear norm in the scaled variables of
    # ufm/THEORY.md, section 3, is what both decay terms cost together.
    spectrum = gauge * margin * direction_norm
    return ClosedForm(
        problem=problem,
        critical_count=_where_learning_starts(problem, critical),
        collapsed=collapsed,
        margin=margin,
        loss=loss,
        loss_slope=slope / (decay_W * problem.unshared_decay).sqrt(),
        feature_norm_sq=spectrum / (decay_H * counts),
        weight_norm_sq=_weight_norm_sq(problem, spectrum) / decay_W,
        objective=(problem.mass * loss + spectrum).sum(-1),
    )


def _V(problem: UFMProblem) -> int:
    return problem.num_classes


def _off(problem: UFMProblem) -> int:
    return problem.num_classes - 1


def _check_covered(problem: UFMProblem) -> None:
    if problem.is_rowwise:
        raise ValueError("lambda_W differs between rows; the closed form expects one lambda_W")
    if problem.bias:
        raise ValueError("bias is True; the closed form expects a problem without a bias")
    if not problem.nonnegative and problem.loss == "cross_entropy":
        raise ValueError("nonnegative is False; the closed form of cross-entropy expects H >= 0")


def _check_width(problem: UFMProblem, collapsed: Bool[Tensor, "*batch V"]) -> None:
    active = int((~collapsed).sum(-1).max())
    if problem.feature_width < active:
        raise ValueError(
            f"width is {problem.feature_width}; the closed form expects at least the number of "
            f"active classes, {active}"
        )


def _critical_count(problem: UFMProblem) -> Float[Tensor, "*batch V"]:
    """critical[k] = lambda_W lambda_H[k] n_k^-s N^2 V/(V-1) / (a_k (1 - e))^2; without V/(V-1) for
    MSE. It is the n_c of `ClosedForm` where s = 0."""
    total = problem.num_samples.to(torch.float64).unsqueeze(-1)
    critical = (problem.row_decay.sqrt() * problem.feature_decay.sqrt() * total).square()
    if problem.loss == "cross_entropy":
        critical = critical * (_V(problem) / _off(problem))
    if problem.loss_weights is not None:
        critical = critical / problem.loss_weights.square()
    return critical / (1.0 - problem.label_smoothing) ** 2


def _where_learning_starts(problem: UFMProblem, critical: Float[Tensor, "*batch V"]) -> Tensor:
    """n_c: the count that equals its own critical[k], n for n_k in n_k^-s."""
    sharing = problem.feature_sharing
    critical = (critical * problem.counts**sharing) ** (1.0 / (1.0 + sharing))
    per_class_decay = isinstance(problem.lambda_H, Tensor) and problem.lambda_H.shape[-1:] != (1,)
    if problem.loss_weights is not None or per_class_decay:
        return critical
    return critical[..., 0]


def _cross_entropy_terms(
    problem: UFMProblem,
    y: Float[Tensor, "*batch V"],
    y_minus_1: Float[Tensor, "*batch V"],
    collapsed: Bool[Tensor, "*batch V"],
) -> tuple[Float[Tensor, "*batch V"], Float[Tensor, "*batch V"], Float[Tensor, "*batch V"]]:
    V, off, smooth = _V(problem), _off(problem), problem.label_smoothing
    spread = 1.0 + y * (smooth / (1.0 - smooth))
    odds = V * y_minus_1 / spread
    margin = odds.log1p()
    loss = (off / (1.0 + odds)).log1p() + smooth * off / V * margin
    slope = off / (spread * (spread + V * y_minus_1))
    return margin, loss, torch.where(collapsed, 0.0, slope)


def _mse_terms(
    y: Float[Tensor, "*batch V"],
    y_minus_1: Float[Tensor, "*batch V"],
    collapsed: Bool[Tensor, "*batch V"],
) -> tuple[Float[Tensor, "*batch V"], Float[Tensor, "*batch V"], Float[Tensor, "*batch V"]]:
    return y_minus_1 / y, 0.5 / y.square(), torch.where(collapsed, 0.0, 1.0 / y.square())


def _weight_norm_sq(
    problem: UFMProblem, spectrum: Float[Tensor, "*batch V"]
) -> Float[Tensor, "*batch V"]:
    """Squared row norms of sum_k sqrt(spectrum_k) u_k e_k', u_k the unit direction of class k."""
    if problem.loss == "mse":
        return spectrum
    V, off = _V(problem), _off(problem)
    others = spectrum.sum(-1, keepdim=True) - spectrum
    return spectrum * (off / V) + others / (V * off)


def _check_matrix(name: str, problem: UFMProblem, width: int) -> None:
    classes, device = problem.num_classes, problem.class_counts.device
    check_allocation(name, *problem.batch_shape, classes, width, device=device)


def _directions(
    problem: UFMProblem, label: Int[Tensor, "*batch columns"]
) -> Float[Tensor, "*batch V columns"]:
    """Logits of a unit margin at samples of these classes: e_k - 1/V, or e_k for MSE."""
    classes = _V(problem)
    every = torch.arange(classes, device=label.device)
    unit = (label.unsqueeze(-2) == every.unsqueeze(-1)).to(torch.float64)
    return unit if problem.loss == "mse" else unit - 1.0 / classes


def _padded(values: Tensor, width: int, *, dim: int) -> Tensor:
    """With zeros up to this width."""
    shape = list(values.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([values, values.new_zeros(shape)], dim) if shape[dim] else values
