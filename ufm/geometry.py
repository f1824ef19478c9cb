"""Neural-collapse metrics of any (W, H), and how far it is from the closed form.

Features are (d, V), one a class, or (d, N), one a sample, class by class. A class counts as active
when its mean feature is longer than `ACTIVE` times the longest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ufm.certificate import class_means, feature_losses, sample_labels
from ufm.closed_form import closed_form
from ufm.problem import UFMProblem

ACTIVE = 1e-6
RANK_TOLERANCE = 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class Geometry:
    """NaN where a measure has no meaning.

    With balanced classes all are 0 at the minimum but margin, rank and minority_cosine; under
    imbalance within_class, within_class_pinv and orthogonal_frame are.
    """

    active: Bool[Tensor, " V"]
    within_class: float
    """NC1 as a quotient: tr(S_within) / tr(S_between)."""
    within_class_pinv: float
    """NC1 of Papyan et al. (2020): tr(S_within pinv(S_between)) / V."""
    equinorm: float
    """NC2: standard deviation over mean of the active class-mean norms. Not 0 under imbalance."""
    equiangle: float
    """NC2 of the simplex: standard deviation of the cosines between active centred class means."""
    orthogonal_frame: float
    """Largest |cosine| between the means of two active classes: the frame that is right with
    H >= 0."""
    self_duality: float
    """NC3: |W/|W| - M'/|M'||_F with M the class means less their global mean. Under imbalance 0
    where feature_sharing s is 1 only: W is the centred n_k^((1-s)/2) mu_k (ufm/THEORY.md, sections
    5 and 6)."""
    margin: Float[Tensor, " V"]
    """Least logit of the own class less the largest of the others, over the samples of a class."""
    rank: int
    """Rank of the logits of the class means."""
    minority_cosine: float
    """Mean cosine between the classifiers of collapsed classes: 1 at minority collapse."""


def neural_collapse(
    problem: UFMProblem,
    W: Float[Tensor, "V d"],
    H: Float[Tensor, "d columns"],
    *,
    within_class_variance: Float[Tensor, " V"] | None = None,
) -> Geometry:
    """Measures one (W, H). ValueError for a batch.

    Where H holds the class means of a trained network, `within_class_variance` tells what they
    left out, the mean squared distance of a class's features to its mean; `within_class_pinv`,
    which needs the whole covariance, is then NaN, and margins are those of the means.
    """
    if problem.batch_shape:
        raise ValueError(f"problem has batch shape {tuple(problem.batch_shape)}; expected one")
    label = _labels(problem, H)
    for name, values in (("W", W), ("H", H)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} is not finite everywhere; expected finite values")
    means = class_means(problem, H)
    norms = means.norm(dim=0)
    active = norms > ACTIVE * norms.max()
    active &= norms > 0
    kept = means[:, active]
    centred = means - means.mean(1, keepdim=True)
    if within_class_variance is None:
        nc1, nc1_pinv = _within_class(H, means, centred, label)
    else:
        nc1, nc1_pinv = _over(float(within_class_variance.mean()), _between(centred)), math.nan
    logits = W @ H
    return Geometry(
        active=active,
        within_class=nc1,
        within_class_pinv=nc1_pinv,
        equinorm=_variation(kept.norm(dim=0)),
        equiangle=_spread(_cosines(kept - kept.sum(1, keepdim=True) / max(1, kept.shape[1]))),
        orthogonal_frame=_largest(_cosines(kept).abs()),
        self_duality=_distance(W.T, centred),
        margin=_margins(problem, logits, label),
        rank=int(torch.linalg.matrix_rank(W @ means, rtol=RANK_TOLERANCE)),
        minority_cosine=mean_cosine(W[~active]),
    )


def mean_cosine(rows: Float[Tensor, "k d"]) -> float:
    """Mean cosine between two of the rows; NaN for fewer than two."""
    return _mean(_cosines(rows.T))


def class_errors(
    problem: UFMProblem, W: Float[Tensor, "V d"], H: Float[Tensor, "d columns"]
) -> Float[Tensor, " V"]:
    """|loss_k - closed form| / closed form of each class. ValueError where there is none."""
    label = _labels(problem, H)
    losses = feature_losses(problem, W, H)
    mean = losses.new_zeros(problem.num_classes).index_add(0, label, losses)
    mean = mean / torch.bincount(label, minlength=problem.num_classes)
    exact = closed_form(problem).loss
    return (mean - exact).abs() / exact


def _labels(problem: UFMProblem, H: Float[Tensor, "d columns"]) -> Tensor:
    if H.shape[1] == problem.num_classes:
        return torch.arange(problem.num_classes, device=H.device)
    if H.shape[1] != int(problem.num_samples):
        raise ValueError(
            f"H has shape {tuple(H.shape)}; expected {problem.num_classes} or "
            f"{int(problem.num_samples)} columns"
        )
    return sample_labels(problem)


def _within_class(H: Tensor, means: Tensor, centred: Tensor, label: Tensor) -> tuple[float, float]:
    deviation = H - means[:, label]
    counts = torch.bincount(label, minlength=means.shape[1])
    # Every class has the same say, however many samples it has.
    weighted = deviation / counts[label].to(H.dtype).sqrt()
    within = weighted @ weighted.T / means.shape[1]
    between = _between(centred)
    if float(between.trace()) == 0.0:
        return math.nan, math.nan
    inverse = torch.linalg.pinv(between, hermitian=True, rtol=RANK_TOLERANCE)
    quotient = _over(float(within.trace()), between)
    return quotient, float((within @ inverse).trace()) / means.shape[1]


def _between(centred: Float[Tensor, "d V"]) -> Float[Tensor, "d d"]:
    return centred @ centred.T / centred.shape[1]


def _over(within: float, between: Float[Tensor, "d d"]) -> float:
    trace = float(between.trace())
    return within / trace if trace > 0.0 else math.nan


def _cosines(columns: Float[Tensor, "d k"]) -> Float[Tensor, " pairs"]:
    unit = columns / columns.norm(dim=0).clamp(min=1e-300)
    gram = unit.T @ unit
    pairs: Tensor = gram[torch.ones_like(gram, dtype=torch.bool).triu(1)]
    return pairs


def _margins(problem: UFMProblem, logits: Tensor, label: Tensor) -> Float[Tensor, " V"]:
    own = logits.gather(0, label.unsqueeze(0)).squeeze(0)
    others = logits.scatter(0, label.unsqueeze(0), -torch.inf).amax(0)
    least = logits.new_full((problem.num_classes,), torch.inf)
    margins: Tensor = least.scatter_reduce(0, label, own - others, "amin")
    return margins


def _distance(one: Tensor, other: Tensor) -> float:
    if not bool(one.any()) or not bool(other.any()):
        return math.nan
    return float((one / one.norm() - other / other.norm()).norm())


def _variation(values: Tensor) -> float:
    return float(values.std(correction=0) / values.mean()) if len(values) else math.nan


def _spread(values: Tensor) -> float:
    return float(values.std(correction=0)) if len(values) else math.nan


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else math.nan
