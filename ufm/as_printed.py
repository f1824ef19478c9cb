"""The paper's formulas to the letter, errors included; only to show how far off they are.

Each function names the place in arXiv 2410.11985 and what ufm/THEORY.md, section 5, corrects.
`closed_form` holds the corrected ones. All take one plain problem (cross-entropy, scalar decays);
where it shares features, lambda_H n_k^-s stands for lambda_H.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ufm.certificate import objective as corrected_objective
from ufm.problem import UFMProblem

COVERING_SHARE = 1e-4
"""Section 4.1: 95 % of IMDB tokens are "the top 0.01 % of tokens"."""


def objective(
    problem: UFMProblem, W: Float[Tensor, "V d"], H: Float[Tensor, "d columns"]
) -> Float[Tensor, ""]:
    """Eq. (1): the feature decay without its 1/2 (lambda_H |H|^2)."""
    scale = problem.feature_decay
    if H.shape[-1] == problem.num_classes:
        scale = scale * problem.counts
    else:
        scale = scale.repeat_interleave(problem.class_counts)
    return corrected_objective(problem, W, H) + 0.5 * (scale * H.square().sum(-2)).sum()


def margin(problem: UFMProblem) -> Float[Tensor, " V"]:
    """M_k, Section 5: the root covers only (V-1)/V, not lambda_W lambda_H."""
    V, N, lambda_W, _ = _plain(problem)
    decays = lambda_W * problem.feature_decay
    ratio = problem.counts.sqrt() / (N * math.sqrt((V - 1) / V) * decays)
    inside = (V - 1) * (ratio - 1.0)
    return torch.where(inside > 1.0, inside, 1.0).log()


def weight_norm_sq(problem: UFMProblem, margin: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """(d), Section 5, at a given margin: the last sum runs over all j, k included."""
    V, _, lambda_W, _ = _plain(problem)
    term = (problem.feature_decay * problem.counts).sqrt() * margin
    return ((V - 1) ** 2 * term + term.sum()) / math.sqrt(lambda_W * V**3 * (V - 1))


def critical_count(problem: UFMProblem) -> float:
    """Corollary 4.6 as used in Section 5: lambda_W lambda_H N^2 (V-1)/V, for V/(V-1)."""
    V, N, lambda_W, lambda_H = _plain(problem)
    power = 1.0 / (1.0 + problem.feature_sharing)
    return float((lambda_W * lambda_H * N**2 * (V - 1) / V) ** power)


def collapsed(problem: UFMProblem) -> Bool[Tensor, " V"]:
    """Section 5: neglected iff n_k is at most the printed critical count."""
    return problem.class_counts <= critical_count(problem)


def loss(margin: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
    """Proposition 5.1: log(sum_j exp(M_j / V^2)) - M_k, at a given margin. It can be negative."""
    return torch.logsumexp(margin / len(margin) ** 2, 0) - margin


def logits(margin: Float[Tensor, " V"]) -> Float[Tensor, "V V"]:
    """Appendix A, proof: w_k.mu_k = M_k and w_j.mu_k = M_j / V^2; column k is class k."""
    V = len(margin)
    other = (margin / V**2).unsqueeze(1).expand(V, V).clone()
    other.diagonal().copy_(margin)
    return other


def loss_slope(
    problem: UFMProblem, margin: Float[Tensor, " V"], margin_slope: Float[Tensor, " V"]
) -> Float[Tensor, " V"]:
    """d loss / d lambda, Section 5: d loss'/d lambda + (1/lambda + bracket) where learned.

    loss' = log(sum_j exp(M_j / V^2)), differentiated through the given margins and their slopes;
    NaN where the printed root is not real. ValueError unless lambda_W = lambda_H.
    """
    V, N, lambda_W, lambda_H = _plain(problem)
    if lambda_W != lambda_H:
        raise ValueError(f"lambda_W = {lambda_W} and lambda_H = {lambda_H}; expected equal ones")
    common = (torch.softmax(margin / V**2, 0) * margin_slope / V**2).sum()
    per_lambda = N * math.sqrt(V - 1) * problem.counts ** (-0.5 * problem.feature_sharing)
    root = (problem.counts * V - lambda_W * per_lambda).sqrt()
    own = 1.0 / lambda_W + per_lambda / root
    learned = problem.class_counts > critical_count(problem)
    return common + torch.where(learned, own, 0.0)


def _plain(problem: UFMProblem) -> tuple[int, float, float, float]:
    lambda_W, lambda_H = problem.lambda_W, problem.lambda_H
    if isinstance(lambda_W, Tensor) or isinstance(lambda_H, Tensor) or problem.batch_shape:
        raise ValueError("expected one problem with scalar lambda_W and lambda_H")
    return problem.num_classes, float(problem.num_samples), lambda_W, lambda_H
