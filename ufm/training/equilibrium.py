"""What theory says about a table's training (ufm/THEORY.md, section 10).

L2 has a closed form. Decoupled decay has none, as no F is minimised: here are the size of a row
that is pushed one way, the margin that decay leaves where a class wins some of it back, and a
training of two numbers a class in place of two rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ufm.closed_form import closed_form
from ufm.problem import UFMProblem
from ufm.training.settings import TableTraining
from ufm.training.table import optimise


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What is said of each class where a training ends."""

    loss: Float[Tensor, " V"]
    """In nats, against the target of `TrainedTable.loss`."""
    margin: Float[Tensor, " V"]


def l2_minimum(training: TableTraining, weight_decay: float | int) -> Prediction:
    """The minimum of the mean loss plus decay/2 (|W|^2 + |table|^2) over a nonnegative table.

    A row of the table is decayed once and not once a sample: with m_k contexts that share the n_k
    samples of class k this is lambda_H[k] = decay * m_k / n_k. Label noise is label smoothing.

    Raises ValueError for a decay of 0, whose minimum is at infinity, and as `closed_form` does.
    """
    exact = closed_form(
        UFMProblem(
            class_counts=training.counts,
            lambda_W=weight_decay,
            lambda_H=weight_decay * training.contexts_of_class.double() / training.counts,
            label_smoothing=training.label_noise,
            nonnegative=training.feature_kind == "nonnegative",
            width=training.feature_width,
        )
    )
    return Prediction(loss=exact.loss, margin=exact.margin)


def mean_update(
    share: Float[Tensor, "*rows"], *, beta1: float, beta2: float
) -> Float[Tensor, "*rows"]:
    """Mean over the steps of m / sqrt(v) of Adam for a gradient that is 1 in a share of the steps.

    Exact for steps evenly spaced, 1/share apart. sqrt(share) where share >> 1 - beta2, and about
    share / sqrt(1 - beta2) where share << 1 - beta2; share / sqrt(share + 1 - beta2) joins the two.
    """
    gap = 1.0 / share.clamp(min=1e-300)
    ratio = beta1 / math.sqrt(beta2)
    largest = (1.0 - beta1) / math.sqrt(1.0 - beta2) * (1.0 - beta2**gap).sqrt()
    sums = gap if ratio == 1.0 else (1.0 - ratio**gap) / (1.0 - ratio)
    return share * largest / (1.0 - beta1**gap) * sums


def row_size(
    training: TableTraining, weight_decay: float | int, share: Float[Tensor, "*rows"]
) -> Float[Tensor, "*rows"]:
    """|entry| of a row at the end of AdamW, if its gradient kept sign and size wherever it came.

    share: of the steps in which there is a gradient. u = `mean_update` and the sum S of the
    learning rates give u S (1 - exp(-kappa)) / kappa with kappa = decay S, from u S without decay
    to the steady u / decay; added up here step by step, with the start that is decayed away.
    A gradient that shrinks or turns pushes less, so that this is a bound but for the noise.
    """
    push = mean_update(share, beta1=training.beta1, beta2=training.beta2)
    left, pushed = 1.0, 0.0
    for rate in training.learning_rates.tolist():
        left *= 1.0 - rate * weight_decay
        pushed = pushed * (1.0 - rate * weight_decay) + rate
    return push * pushed + training.start_size * math.sqrt(2.0 / math.pi) * left


def margin_kept(
    kappa: float | int, win_back: Float[Tensor, "*classes"], *, factors: int
) -> Float[Tensor, "*classes"]:
    """M(kappa) / M(0) of a margin that goes to M* at the rate K and loses f kappa, from 0:

        dM/dx = K (M* - M) - f kappa M,      x the share of the sum of learning rates that is past
        M(kappa) / M(0) = K / (K + f kappa) (1 - exp(-K - f kappa)) / (1 - exp(-K))

    win_back: K > 0. factors: f, how many decayed weights the margin is a product of. In first
    order it is exp(-kappa s) with s = f (1/K - 1/(exp(K) - 1)): f/2 where K << 1, f/K where K >> 1.
    """
    total = win_back + factors * kappa
    kept: Tensor = (win_back / total) * (torch.expm1(-total) / torch.expm1(-win_back))
    return kept


def win_back_rate(training: TableTraining) -> Float[Tensor, " V"]:
    """K of `margin_kept` for AdamW with label noise e, free or normalized features, no fit.

    With l_k = batch_size n_k / N samples of class k a step, S the sum of the learning rates, M*
    the margin of the noisy target, and the second moments those of the noise alone:

        table row       u_k = l_k / sqrt(l_k + 1 - beta2)
        classifier row  v_k = l_k / sqrt(l_k + batch_size / V)     (it sees every class's noise)
        free            K = S sqrt(d M* e) (u_k + v_k)
        normalized      K = S d sqrt(e) v_k                        (the length of a row is fixed)

    So K ~ sqrt(n_k) of a frequent class. Raises ValueError without label noise, where the residual
    has no floor to set the second moments.
    """
    noise, classes = training.label_noise, len(training.counts)
    if noise == 0.0:
        raise ValueError(f"label_noise is {noise}; expected > 0 for a rate of winning back")
    seen = training.batch_size * training.counts.double() / float(training.counts.sum())
    classifier = seen / (seen + training.batch_size / classes).sqrt()
    rates, width = float(training.learning_rates.sum()), training.feature_width
    if training.feature_kind == "normalized":
        return rates * width * math.sqrt(noise) * classifier
    table = seen / (seen + 1.0 - training.beta2).sqrt()
    target = math.log1p((1.0 - noise) * classes / noise)
    return rates * math.sqrt(width * target * noise) * (table + classifier)


def amplitudes(training: TableTraining, weight_decay: float | int) -> Prediction:
    """Two numbers a class in place of two rows, trained as the table is.

    A row of the table is a_c and a row of the classifier b_k times signs that agree, so that the
    margin is d a_c b_k and the classes do not meet; on the samples of the table's own training,
    from the size of the agreeing part of two random entries.

    Raises ValueError for features other than free, whose margin is another product.
    """
    if training.feature_kind != "free":
        raise ValueError(f"features are {training.feature_kind}; expected free")
    classes, contexts = len(training.counts), training.contexts_of_class
    start = training.start_size / math.sqrt(math.pi)
    a = torch.full((int(contexts.sum()),), start, dtype=torch.float64, requires_grad=True)
    b = torch.full((classes,), start, dtype=torch.float64, requires_grad=True)

    def losses(margin: Tensor, wrong: Tensor) -> Tensor:
        return F.softplus(math.log(classes - 1) - margin) + margin * wrong

    def batch_loss(rows: Tensor, own: Tensor, targets: Tensor) -> Tensor:
        return losses(training.feature_width * a[rows] * b[own], targets != own).mean()

    optimise(training, [a, b], batch_loss, weight_decay=weight_decay)
    label = torch.repeat_interleave(torch.arange(classes), contexts)
    margin = (training.feature_width * a * b[label]).detach()
    wrong = torch.tensor(training.label_noise * (classes - 1) / classes, dtype=torch.float64)
    zero = torch.zeros(classes, dtype=torch.float64)
    return Prediction(
        loss=zero.index_add(0, label, losses(margin, wrong)) / contexts,
        margin=zero.index_add(0, label, margin) / contexts,
    )
