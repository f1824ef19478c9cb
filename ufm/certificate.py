"""How far a candidate (W, H) of the UFM can be from the global minimum, without knowing it.

Put g_k = mass_k (q_k - p_k) / sqrt(lambda_W lambda_H[k] n_k), the columns of G. Every G with
|G b| <= |b| for all b >= 0 gives a lower bound on F (ufm/THEORY.md, section 3); a candidate's own
G, shrunk by the least s that makes it so, gives one that is tight at the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ufm.closed_form import ClosedForm
from ufm.problem import UFMProblem, check_allocation

EXACT_EIGENVALUES_UP_TO = 3000
POWER_STEPS = 60


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
    of W is certified in O(V), without building its matrices.

    Raises ValueError on shapes that do not fit, values that are not finite, and negative H where
    the problem has H >= 0.
    """
    if isinstance(W, ClosedForm):
        return _certify_closed_form(problem, W)
    W, H, bias = _checked(problem, W, H, bias)
    value = objective(problem, W, H, bias=bias)
    means = class_means(problem, H)
    logits = W @ means if bias is None else W @ means + bias.unsqueeze(-1)
    return Certificate(objective=value, lower_bound=lower_bound(problem, logits))


def objective(
    problem: UFMProblem,
    W: Float[Tensor, "*batch V d"],
    H: Float[Tensor, "*batch d columns"],
    *,
    bias: Float[Tensor, "*batch V"] | None = None,
) -> Float[Tensor, "*batch"]:
    """F(W, H) with one feature a class or one a sample; shapes as in `certify`."""
    counts, mass, decay = problem.counts, problem.mass, problem.feature_decay
    logits = W @ H if bias is None else W @ H + bias.unsqueeze(-1)
    if H.shape[-1] == problem.num_classes:
        loss, scale = class_losses(problem, logits), decay * counts
    else:
        label = sample_labels(problem)
        loss = class_losses(problem, logits, label)
        mass, scale = (mass / counts)[..., label], decay[..., label]
    return (
        (mass * loss).sum(-1)
        + 0.5 * (problem.row_decay * W.square().sum(-1)).sum(-1)
        + 0.5 * (scale * H.square().sum(-2)).sum(-1)
    )


def sample_labels(problem: UFMProblem) -> Tensor:
    """(N,) class of each sample, class by class; a batch must share its class counts."""
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
    label: Tensor | None = None,
) -> Float[Tensor, "*batch columns"]:
    """Loss of each column of logits; column k is of class k unless `label` says otherwise."""
    if label is None:
        own = logits.diagonal(dim1=-2, dim2=-1)
    else:
        own = logits.gather(-2, label.expand(*logits.shape[:-2], 1, -1)).squeeze(-2)
    if problem.loss == "mse":
        return 0.5 * logits.square().sum(-2) - own + 0.5
    if label is None:
        masked = logits - torch.diag_embed(torch.full_like(own, torch.inf))
    else:
        index = label.expand(*logits.shape[:-2], 1, -1)
        masked = logits.scatter(-2, index, -torch.inf)
    # log(1 + sum_j exp(z_j - z_k)): a loss of 1e-20 keeps its digits.
    rest = torch.logsumexp(masked - own.unsqueeze(-2), -2)
    loss = torch.nn.functional.softplus(rest, threshold=1e9)
    smooth = problem.label_smoothing
    return loss + smooth * (own - logits.mean(-2)) if smooth else loss


def residual(
    problem: UFMProblem, logits: Float[Tensor, "*batch V V"]
) -> Float[Tensor, "*batch V V"]:
    """Gradient of each class's loss in its logits: p_k - q_k (cross-entropy), z_k - e_k (MSE).

    The diagonal is minus the sum of the rest, so that 1 - p_kk keeps its digits when it is tiny.
    """
    if problem.loss == "mse":
        return logits - torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    slope = torch.softmax(logits, -2)
    slope.diagonal(dim1=-2, dim2=-1).zero_()
    others = slope.sum(-2)
    smooth, classes = problem.label_smoothing, logits.shape[-1]
    if smooth:
        slope = slope - smooth / classes
        others = others - smooth * (classes - 1) / classes
    slope.diagonal(dim1=-2, dim2=-1).copy_(-others)
    return slope


def lower_bound(
    problem: UFMProblem, logits: Float[Tensor, "*batch V V"]
) -> Float[Tensor, "*batch"]:
    """Lower bound on min F from the logits of one feature a class, at any width."""
    slope = residual(problem, logits)
    if problem.bias:
        # A free bias needs sum_k mass_k slope_k = 0; the bound does not hold otherwise.
        slope = slope - (slope * problem.mass.unsqueeze(-2)).sum(-1, keepdim=True)
    scale = dual_scale(scaled_residual(problem, slope), nonnegative=problem.nonnegative)
    return _dual_value(problem, slope / scale[..., None, None])


def scaled_residual(
    problem: UFMProblem, slope: Float[Tensor, "*batch V V"]
) -> Float[Tensor, "*batch V V"]:
    """G, up to sign, from the gradients in the logits."""
    counts, decay = problem.counts, problem.feature_decay
    columns = problem.mass / (decay * counts).sqrt()
    return slope * columns.unsqueeze(-2) / problem.row_decay.sqrt().unsqueeze(-1)


def dual_scale(
    G: Float[Tensor, "*batch V V"], *, nonnegative: bool = True
) -> Float[Tensor, "*batch"]:
    """Least s >= 1 known to make G / s feasible: |G b| <= s |b| for all b >= 0.

    With H >= 0 it is max(1, sqrt(lambda_max(max(G'G, 0)))), bounded from above through Perron's
    theorem; without, the spectral norm.
    """
    gram = G.mT @ G
    if nonnegative:
        gram = gram.clamp(min=0.0)
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


def _dual_value(problem: UFMProblem, slope: Float[Tensor, "*batch V V"]) -> Float[Tensor, "*batch"]:
    """sum_k mass_k (-f_k*(slope_k)) for feasible slopes; for cross-entropy the mean entropy of
    q_k + slope_k."""
    own = slope.diagonal(dim1=-2, dim2=-1)
    if problem.loss == "mse":
        return (problem.mass * (-0.5 * slope.square().sum(-2) - own)).sum(-1)
    smooth, classes = problem.label_smoothing, slope.shape[-1]
    rest = slope + smooth / classes
    rest.diagonal(dim1=-2, dim2=-1).zero_()
    miss = -own + smooth * (classes - 1) / classes
    # Only a bias can push phat outside the simplex; F >= 0 is then all that is known.
    outside = bool((rest < 0).any())
    entropy = -torch.xlogy(rest, rest.clamp(min=0.0)).sum(-2) - _xlogx_of_complement(miss)
    value = (problem.mass * entropy).sum(-1)
    return torch.where((rest < 0).flatten(-2).any(-1), 0.0, value) if outside else value


def _xlogx_of_complement(miss: Tensor) -> Tensor:
    """(1 - m) log(1 - m), accurate for tiny m; 0 at m = 1."""
    return torch.where(miss < 1.0, (1.0 - miss) * torch.log1p(-miss), 0.0)


def _certify_closed_form(problem: UFMProblem, optimum: ClosedForm) -> Certificate:
    """At g_k = a_k (e_k - 1/V) the off-diagonal of G'G is <= 0: s is the largest column norm."""
    classes, mass = problem.num_classes, problem.mass
    off, smooth = classes - 1, problem.label_smoothing
    if problem.loss == "mse":
        miss = 1.0 - optimum.margin
        scale = (problem.pull * miss).amax(-1, keepdim=True).clamp(min=1.0)
        shrunk = miss / scale
        entropy = shrunk - 0.5 * shrunk.square()
        return Certificate(objective=optimum.objective, lower_bound=(mass * entropy).sum(-1))
    tail = (-optimum.margin).exp()
    spread = off * tail / (1.0 + off * tail) - smooth * off / classes
    norm = problem.pull * spread * (classes / off) ** 0.5
    scale = norm.amax(-1, keepdim=True).clamp(min=1.0)
    miss = spread / scale + smooth * off / classes
    entropy = -torch.xlogy(miss, miss / off) - _xlogx_of_complement(miss)
    return Certificate(objective=optimum.objective, lower_bound=(mass * entropy).sum(-1))


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
    check_allocation("logits", *batch, classes, H.shape[-1], device=device)
    return W, H, bias
