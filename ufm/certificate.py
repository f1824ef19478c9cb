"""How far a candidate (W, H) of the UFM can be from the global minimum, without knowing it.

Put g_k = mass_k (q_k - p_k) / sqrt(lambda_W feature_decay[k] n_k), the columns of G. Every G with
|G b| <= |b| for all b >= 0 gives a lower bound on F (ufm/THEORY.md, section 3); a candidate's own
G, shrunk by the least s that makes it so, gives one that is tight at the minimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ufm.closed_form import ClosedForm
from ufm.problem import UFMProblem, allocation, check_allocation

EXACT_EIGENVALUES_UP_TO = 3000
POWER_STEPS = 60
BLOCK_ELEMENTS = 2**24
"""Logits that are held at a time."""
ROUNDING = 1e-15
"""Coupling (see `_coupling`) that is rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate:
    """F(W, H), a lower bound on the minimum of F over all widths, and their difference."""

    objective: Float[Tensor, "*batch"]
    lower_bound: Float[Tensor, "*batch"]

    @property
    def gap(self) -> Float[Tensor, "*batch"]:
        """objective - lower_bound: how far above the global minimum the candidate can be."""
        return self.objective - self.lower_bound


def certify(
    problem: UFMProblem,
    W: Tensor | np.ndarray | ClosedForm,
    H: Tensor | np.ndarray | None = None,
    *,
    bias: Tensor | None = None,
) -> Certificate:
    """Certificate of any (W, H), from any solver (ufm/THEORY.md, section 4).

    W: (..., V, d). H: (..., d, V), one feature a class, or (..., d, N), one a sample, class by
    class in class order. `bias`: (..., V), only for a problem with a bias. A ClosedForm in place
    of W is certified in O(V), without building its matrices. Otherwise, with K classes whose mean
    feature is not zero, it holds V K + K^2 numbers; K is V for free features, a bias or row-wise
    lambda_W.

    Raises ValueError on shapes that do not fit, values that are not finite, negative H where
    the problem has H >= 0, and what is too large to allocate.
    """
    if isinstance(W, ClosedForm):
        return _certify_closed_form(problem, W)
    W, H, bias = _checked(problem, W, H, bias)
    with allocation("the certificate"):
        value = objective(problem, W, H, bias=bias)
        bound = lower_bound(problem, W, class_means(problem, H), bias=bias)
    return Certificate(objective=value, lower_bound=bound)


def objective(
    problem: UFMProblem,
    W: Float[Tensor, "*batch V d"],
    H: Float[Tensor, "*batch d columns"],
    *,
    bias: Float[Tensor, "*batch V"] | None = None,
) -> Float[Tensor, "*batch"]:
    """F(W, H) with one feature a class or one a sample; shapes as in `certify`."""
    counts, mass, decay = problem.counts, problem.mass, problem.feature_decay
    loss, scale = feature_losses(problem, W, H, bias=bias), decay * counts
    if H.shape[-1] != problem.num_classes:
        label = sample_labels(problem)
        mass, scale = (mass / counts)[..., label], decay[..., label]
    return (
        (mass * loss).sum(-1)
        + 0.5 * (problem.row_decay * W.square().sum(-1)).sum(-1)
        + 0.5 * (scale * H.square().sum(-2)).sum(-1)
    )


def feature_losses(
    problem: UFMProblem,
    W: Float[Tensor, "*batch V d"],
    H: Float[Tensor, "*batch d columns"],
    *,
    bias: Float[Tensor, "*batch V"] | None = None,
) -> Float[Tensor, "*batch columns"]:
    """Loss of every column of H, (d, V) or (d, N). Holds the logits of a block of columns at a
    time, and computes none where the feature is zero."""
    classes = problem.num_classes
    label = torch.arange(classes, device=H.device)
    if H.shape[-1] != classes:
        label = sample_labels(problem)
    at_zero = 0.5 if problem.loss == "mse" else math.log(classes)
    losses = H.new_full((*H.shape[:-2], H.shape[-1]), at_zero)
    for index in _blocks(problem, _moving(H, bias)):
        losses[..., index] = class_losses(problem, _logits(W, H, bias, index), label[index])
    return losses


def _moving(
    H: Float[Tensor, "*batch d columns"], bias: Float[Tensor, "*batch V"] | None
) -> Int[Tensor, " moving"]:
    """Columns whose logits are not all zero, in any problem of the batch."""
    if bias is not None:
        return torch.arange(H.shape[-1], device=H.device)
    return (H != 0).any(-2).reshape(-1, H.shape[-1]).any(0).nonzero().squeeze(1)


def _blocks(problem: UFMProblem, index: Int[Tensor, " k"]) -> tuple[Int[Tensor, " some"], ...]:
    """`index` cut so that the logits of a block stay within BLOCK_ELEMENTS."""
    rows = math.prod(problem.class_counts.shape)
    return torch.split(index, max(1, BLOCK_ELEMENTS // max(1, rows))) if len(index) else ()


def _logits(
    W: Float[Tensor, "*batch V d"],
    H: Float[Tensor, "*batch d columns"],
    bias: Float[Tensor, "*batch V"] | None,
    index: Int[Tensor, " some"],
) -> Float[Tensor, "*batch V some"]:
    logits = W @ H[..., index]
    return logits if bias is None else logits + bias.unsqueeze(-1)


def sample_labels(problem: UFMProblem) -> Tensor:
    """(N,) class of each sample, class by class. ValueError for a batch of unequal class counts."""
    counts = problem.class_counts.reshape(-1, problem.num_classes)
    if bool((counts != counts[0]).any()):
        raise ValueError("class_counts differ within the batch; expected equal ones for (d, N)")
    return torch.repeat_interleave(torch.arange(len(counts[0]), device=counts.device), counts[0])


def class_means(
    problem: UFMProblem, H: Float[Tensor, "*batch d columns"]
) -> Float[Tensor, "*batch d V"]:
    """Mean feature of each class. By convexity F cannot rise when samples move to their mean, so
    a bound taken there holds for every H."""
    if H.shape[-1] == problem.num_classes:
        return H
    sums = H.new_zeros(*H.shape[:-1], problem.num_classes)
    sums = sums.index_add(-1, sample_labels(problem), H)
    return sums / problem.counts.unsqueeze(-2)


def class_losses(
    problem: UFMProblem,
    logits: Float[Tensor, "*batch V columns"],
    label: Int[Tensor, " columns"],
) -> Float[Tensor, "*batch columns"]:
    """Loss of each column of logits, column c of class `label[c]`."""
    index = label.expand(*logits.shape[:-2], 1, -1)
    own = logits.gather(-2, index)
    if problem.loss == "mse":
        return 0.5 * residual(problem, logits, label).square().sum(-2)
    # log(1 + sum_j exp(z_j - z_k)): a loss of 1e-20 keeps its digits.
    rest = torch.logsumexp(logits.scatter(-2, index, -torch.inf) - own, -2)
    loss = torch.nn.functional.softplus(rest, threshold=1e9)
    smooth = problem.label_smoothing
    return loss + smooth * (own.squeeze(-2) - logits.mean(-2)) if smooth else loss


def residual(
    problem: UFMProblem,
    logits: Float[Tensor, "*batch V columns"],
    label: Int[Tensor, " columns"],
) -> Float[Tensor, "*batch V columns"]:
    """Gradient of each column's loss in its logits: p_k - q_k (cross-entropy), z_k - e_k (MSE).

    The own entry is minus the sum of the rest, so that 1 - p_kk keeps its digits when it is tiny.
    """
    index = label.expand(*logits.shape[:-2], 1, -1)
    if problem.loss == "mse":
        return logits.scatter_add(-2, index, logits.new_full(index.shape, -1.0))
    slope = torch.softmax(logits, -2).scatter_(-2, index, 0.0)
    others = slope.sum(-2, keepdim=True)
    smooth, classes = problem.label_smoothing, problem.num_classes
    if smooth:
        slope -= smooth / classes
        others -= smooth * (classes - 1) / classes
    return slope.scatter_(-2, index, -others)


def lower_bound(
    problem: UFMProblem,
    W: Float[Tensor, "*batch V d"],
    means: Float[Tensor, "*batch d V"],
    *,
    bias: Float[Tensor, "*batch V"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Lower bound on min F, at any width, from one feature a class.

    A class with mu_k = 0 has g_k along e_k - 1/V (MSE: e_k), and its products with the columns of
    other classes are mostly <= 0: such columns are then left out of G'G, whatever their number.
    """
    everything = torch.arange(problem.num_classes, device=W.device)
    index = everything
    if problem.nonnegative and not problem.bias and not problem.is_rowwise:
        index = _moving(means, bias)
    G = _scaled_residuals(problem, W, means, bias, index)
    coupling = _coupling(problem, G, index)
    if bool((coupling > ROUNDING).any()):
        index = everything
        G = _scaled_residuals(problem, W, means, bias, index)
        coupling = torch.zeros_like(coupling)
    resting = torch.ones_like(everything, dtype=torch.bool).index_fill(0, index, False)
    spread = torch.full_like(problem.mass, _spread_at_zero(problem)) * resting
    scale = _even_norms(problem, spread).amax(-1).clamp(min=1.0)
    if len(index):
        scale = torch.maximum(scale, dual_scale(G, nonnegative=problem.nonnegative))
    scale = (scale.square() + coupling).sqrt()
    still = torch.where(resting, _even_values(problem, spread / scale.unsqueeze(-1)), 0.0)
    moving = _dual_values(problem, G, index, scale)
    # Only a bias can push phat outside the simplex; F >= 0 is then all that is known.
    return torch.nan_to_num((problem.mass * still).sum(-1) + moving, nan=0.0)


def _gauge(problem: UFMProblem) -> Float[Tensor, "*batch V"]:
    """What turns the gradient in the logits of class k into -g_k, but for the rows' decay."""
    return problem.mass / (problem.feature_decay * problem.counts).sqrt()


def _scaled_residuals(
    problem: UFMProblem,
    W: Float[Tensor, "*batch V d"],
    means: Float[Tensor, "*batch d V"],
    bias: Float[Tensor, "*batch V"] | None,
    index: Int[Tensor, " k"],
) -> Float[Tensor, "*batch V k"]:
    """-G, the columns of the classes at `index`."""
    batch, rows, columns = W.shape[:-2], W.shape[-2], len(index)
    check_allocation(
        "the dual of the certificate", *batch, rows + 2 * columns, columns, device=W.device
    )
    G, filled = W.new_empty(*batch, rows, columns), 0
    for block in _blocks(problem, index):
        slope = residual(problem, _logits(W, means, bias, block), block)
        G[..., filled : filled + len(block)] = slope
        filled += len(block)
    if problem.bias:
        # A free bias needs sum_k mass_k slope_k = 0; the bound does not hold otherwise.
        G -= (G @ problem.mass.unsqueeze(-1)).expand_as(G)
    G *= _gauge(problem)[..., index].unsqueeze(-2)
    G /= problem.row_decay.sqrt().unsqueeze(-1)
    return G


def _coupling(
    problem: UFMProblem, G: Float[Tensor, "*batch V k"], index: Int[Tensor, " k"]
) -> Float[Tensor, "*batch"]:
    """Frobenius norm of the positive products of columns at `index` with those left out: by how
    much, at most, leaving out lowers the largest eigenvalue of max(G'G, 0).

    Columns sum to zero (for MSE a class at rest is along e_k), so such a product is minus entry k
    of the column at `index`, times a positive factor.
    """
    factor = (problem.pull * (1.0 - problem.label_smoothing)).index_fill(-1, index, 0.0)
    total = G.new_zeros(problem.batch_shape)
    for part in torch.split(G, max(1, BLOCK_ELEMENTS // problem.class_counts.numel()), -1):
        total += (part.clamp(max=0.0) * factor.unsqueeze(-1)).square().sum((-1, -2))
    return total.sqrt()


def dual_scale(
    G: Float[Tensor, "*batch V k"], *, nonnegative: bool = True
) -> Float[Tensor, "*batch"]:
    """Least s >= 1 known to make G / s feasible: |G b| <= s |b| for all b >= 0.

    With H >= 0 it is max(1, sqrt(lambda_max(max(G'G, 0)))), bounded from above through Perron's
    theorem; without, the spectral norm.
    """
    gram = G.mT @ G
    if nonnegative:
        gram.clamp_(min=0.0)
        upper, converged = perron_upper_bound(gram)
        if converged or gram.shape[-1] > EXACT_EIGENVALUES_UP_TO:
            return upper.clamp(min=1.0).sqrt()
    largest: Tensor = torch.linalg.eigvalsh(gram)[..., -1]
    return largest.clamp(min=1.0).sqrt()


def perron_upper_bound(
    matrix: Float[Tensor, "*batch V V"], *, steps: int = POWER_STEPS, tolerance: float = 1e-15
) -> tuple[Float[Tensor, "*batch"], bool]:
    """Upper bound on the largest eigenvalue of a symmetric entrywise nonnegative matrix.

    Collatz-Wielandt: max_i (P x)_i / x_i is one for every x > 0. Returns it with whether it is
    within `tolerance` (relative) of a lower bound, for the whole batch.
    """
    x = matrix.new_ones(matrix.shape[:-1])
    upper = matrix.new_full(matrix.shape[:-2], torch.inf)
    lower = matrix.diagonal(dim1=-2, dim2=-1).amax(-1)
    for _ in range(steps):
        image = (matrix @ x.unsqueeze(-1)).squeeze(-1)
        upper = torch.minimum(upper, (image / x).amax(-1))
        lower = torch.maximum(lower, (x * image).sum(-1) / x.square().sum(-1))
        if bool((upper <= lower * (1.0 + tolerance)).all()):
            return upper, True
        peak = image.amax(-1, keepdim=True)
        x = torch.where(peak > 0, image / peak, 1.0).clamp(min=1e-30)
    return upper, False


def _dual_values(
    problem: UFMProblem,
    G: Float[Tensor, "*batch V k"],
    index: Int[Tensor, " k"],
    scale: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """sum of mass_k (-f_k*(slope_k)) over the classes at `index` for -G / scale; for cross-entropy
    the mean entropy of q_k + slope_k, NaN where that is no distribution."""
    total, done = torch.zeros_like(scale), 0
    rows = problem.row_decay.sqrt() / scale.unsqueeze(-1)
    for block in _blocks(problem, index):
        slope = G[..., done : done + len(block)] * rows.unsqueeze(-1)
        slope /= _gauge(problem)[..., block].unsqueeze(-2)
        done += len(block)
        values = _conjugates(problem, slope, block.expand(*slope.shape[:-2], 1, -1))
        total = total + (problem.mass[..., block] * values).sum(-1)
    return total


def _conjugates(
    problem: UFMProblem, slope: Float[Tensor, "*batch V some"], own: Int[Tensor, "*batch 1 some"]
) -> Float[Tensor, "*batch some"]:
    smooth, classes = problem.label_smoothing, problem.num_classes
    at_own = slope.gather(-2, own).squeeze(-2)
    if problem.loss == "mse":
        return -0.5 * slope.square().sum(-2) - at_own
    rest = slope.add_(smooth / classes).scatter_(-2, own, 0.0)
    miss = smooth * (classes - 1) / classes - at_own
    # xlogy is NaN below zero.
    return -torch.xlogy(rest, rest).sum(-2) - _xlogx_of_complement(miss)


def _spread_at_zero(problem: UFMProblem) -> float:
    """By how much the target exceeds the prediction at its own class, at a feature of zero."""
    if problem.loss == "mse":
        return 1.0
    classes = problem.num_classes
    return (1.0 - problem.label_smoothing) * (classes - 1) / classes


def _even_norms(
    problem: UFMProblem, spread: Float[Tensor, "*batch V"]
) -> Float[Tensor, "*batch V"]:
    """|g_k| where target less prediction is `spread` at its own class and as little at each other:
    along e_k - 1/V, for MSE along e_k."""
    classes = problem.num_classes
    longer = 1.0 if problem.loss == "mse" else math.sqrt(classes / (classes - 1))
    return problem.pull * spread * longer


def _even_values(
    problem: UFMProblem, spread: Float[Tensor, "*batch V"]
) -> Float[Tensor, "*batch V"]:
    """-f_k* of the same columns."""
    if problem.loss == "mse":
        return spread - 0.5 * spread.square()
    off = problem.num_classes - 1
    miss = spread + problem.label_smoothing * off / (off + 1)
    return -torch.xlogy(miss, miss / off) - _xlogx_of_complement(miss)


def _xlogx_of_complement(miss: Tensor) -> Tensor:
    """(1 - m) log(1 - m), accurate for tiny m; 0 at m = 1."""
    return torch.where(miss < 1.0, (1.0 - miss) * torch.log1p(-miss), 0.0)


def _certify_closed_form(problem: UFMProblem, optimum: ClosedForm) -> Certificate:
    """At g_k = a_k (e_k - 1/V) the off-diagonal of G'G is <= 0: s is the largest column norm."""
    its = optimum.problem
    same = its.loss == problem.loss and its.label_smoothing == problem.label_smoothing
    for name in ("class_counts", "row_decay", "feature_decay", "mass"):
        same = same and torch.equal(getattr(its, name), getattr(problem, name))
    if not same:
        raise ValueError(f"the closed form is that of {its}; expected that of {problem}")
    if problem.loss == "mse":
        spread = 1.0 - optimum.margin
    else:
        off = problem.num_classes - 1
        tail = (-optimum.margin).exp()
        spread = off * tail / (1.0 + off * tail) - problem.label_smoothing * off / (off + 1)
    scale = _even_norms(problem, spread).amax(-1, keepdim=True).clamp(min=1.0)
    bound = (problem.mass * _even_values(problem, spread / scale)).sum(-1)
    return Certificate(objective=optimum.objective, lower_bound=bound)


def _checked(
    problem: UFMProblem,
    W: Tensor | np.ndarray,
    H: Tensor | np.ndarray | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if H is None:
        raise ValueError("H is None; expected the features that belong to W")
    device = problem.class_counts.device
    W = torch.as_tensor(W, dtype=torch.float64, device=device)
    H = torch.as_tensor(H, dtype=torch.float64, device=device)
    batch, classes = problem.batch_shape, problem.num_classes
    if W.ndim < 2 or W.shape[:-1] != (*batch, classes):
        raise ValueError(f"W has shape {tuple(W.shape)}; expected {(*batch, classes)} x d")
    widths = {classes}
    if not batch or not bool((problem.num_samples != problem.num_samples.flatten()[0]).any()):
        widths.add(int(problem.num_samples.flatten()[0]))
    if H.shape[:-1] != (*batch, W.shape[-1]) or H.shape[-1] not in widths:
        columns = " or ".join(str(width) for width in sorted(widths))
        raise ValueError(
            f"H has shape {tuple(H.shape)}; expected {(*batch, W.shape[-1])} x {columns} "
            "(one column a class or a sample)"
        )
    if problem.bias != (bias is not None):
        raise ValueError(
            f"bias is {'given' if bias is not None else None}; the problem has bias={problem.bias}"
        )
    if bias is not None and bias.shape != (*batch, classes):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {(*batch, classes)}")
    for name, values in (("W", W), ("H", H), ("bias", bias)):
        if values is not None and not bool(torch.isfinite(values).all()):
            bad = values[~torch.isfinite(values)][0].item()
            raise ValueError(f"{name} holds {bad}; expected finite values")
    if problem.nonnegative and bool((H < 0).any()):
        raise ValueError(f"H holds {H.min().item()}; the problem expects H >= 0")
    return W, H, bias
