"""A table of free features and a classifier, trained as networks are: by steps on mini-batches.

Row c of the table is the feature h_c of context c, and the classifier W has one row a class. A step
lowers the mean over a batch of CE(W h_c, y) by SGD or Adam with L2 (decay * w joins the gradient),
or by AdamW (Loshchilov & Hutter 2019: w shrinks by the factor 1 - learning rate * decay beside the
step). All rows are decayed in all steps, whether the batch holds their context or not, as with any
dense parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ufm.problem import check_allocation, usable_device
from ufm.training.samples import batches_with, sample_chunks
from ufm.training.settings import TableTraining, check_decay


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedTable:
    """Where a training ended; on the CPU, in float64."""

    training: TableTraining
    weight_decay: float
    features: Float[Tensor, "contexts d"]
    """h_c of every context, class by class."""
    W: Float[Tensor, "V d"]
    loss: Float[Tensor, " V"]
    """Mean over the contexts of a class, in nats, against its target: e_k, or with label noise e
    the distribution (1 - e) e_k + e / V that its labels come from."""
    margin: Float[Tensor, " V"]
    """Own logit less the logarithm of the mean of exp of the others; mean over the contexts."""
    batches: Int[Tensor, " V"]
    """Batches that held a sample of the class."""

    @property
    def kappa(self) -> float:
        """Decay times the sum of the learning rates: AdamW leaves exp(-kappa) of a weight that
        nothing pushes."""
        return self.weight_decay * float(self.training.learning_rates.sum())


def train_table(
    training: TableTraining, *, weight_decay: float | int, device: str | torch.device = "cpu"
) -> TrainedTable:
    """Trains a table in float64; on one CPU the same seed gives the same bits.

    Raises ValueError for a decay that is not a finite number >= 0, a device that does not work
    here, a table too large to allocate, or a training that diverged.
    """
    classes, contexts = len(training.counts), int(training.contexts_of_class.sum())
    width, chosen = training.feature_width, usable_device(device)
    check_allocation("the table, its gradient and moments", 4, contexts, width, device=chosen)
    generator = training.generator(of_weights=True)
    table, W = (
        training.start_size * torch.randn(rows, width, generator=generator, dtype=torch.float64)
        for rows in (contexts, classes)
    )
    if training.feature_kind == "nonnegative":
        table = table.abs()
    table, W = table.to(chosen).requires_grad_(), W.to(chosen).requires_grad_()

    def batch_loss(rows: Tensor, own: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_features(table[rows], training) @ W.T, targets)

    batches = optimise(training, [table, W], batch_loss, weight_decay=weight_decay)
    features = _features(table.detach(), training).cpu()
    return _measured(training, float(weight_decay), features, W.detach().cpu(), batches)


def optimise(
    training: TableTraining,
    weights: list[Tensor],
    batch_loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    weight_decay: float | int,
) -> Int[Tensor, " V"]:
    """Lowers batch_loss(contexts, classes, labels) in place; batches that held each class.

    Raises ValueError for a decay that is not a finite number >= 0, or weights that diverged.
    """
    optimizer = _optimizer(training, weights, check_decay(weight_decay))
    rates = iter(training.learning_rates.tolist())
    batches = torch.zeros(len(training.counts), dtype=torch.int64)
    for chunk in sample_chunks(training):
        batches += batches_with(chunk[1], len(batches))
        for batch in zip(*(part.to(weights[0].device) for part in chunk), strict=True):
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.zero_grad()
            torch.autograd.backward(batch_loss(*batch))
            optimizer.step()
            if training.feature_kind == "nonnegative":
                weights[0].data.clamp_(min=0.0)
    if not all(bool(torch.isfinite(values).all()) for values in weights):
        raise ValueError(
            f"the training diverged at learning_rate {float(training.learning_rates[0])} and "
            f"weight_decay {weight_decay}; expected smaller ones"
        )
    return batches


def _optimizer(
    training: TableTraining, weights: list[Tensor], weight_decay: float
) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=1.0, weight_decay=weight_decay, fused=True)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(
        weights,
        lr=1.0,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        weight_decay=weight_decay,
        fused=True,
    )


def _features(rows: Float[Tensor, "rows d"], training: TableTraining) -> Float[Tensor, "rows d"]:
    if training.feature_kind != "normalized":
        return rows
    return F.normalize(rows, dim=1) * math.sqrt(training.feature_width)


def _measured(
    training: TableTraining, weight_decay: float, features: Tensor, W: Tensor, batches: Tensor
) -> TrainedTable:
    contexts, noise = training.contexts_of_class, training.label_noise
    label = torch.repeat_interleave(torch.arange(len(contexts)), contexts)
    loss, margin = torch.zeros(2, len(W), dtype=torch.float64)
    # In parts: the logits of all contexts may not fit.
    for part in torch.split(torch.arange(len(label)), 4096):
        logits = features[part] @ W.T
        own = label[part].unsqueeze(1)
        chance = logits.log_softmax(1)
        target = (1.0 - noise) * chance.gather(1, own).squeeze(1) + noise * chance.mean(1)
        others = logits.scatter(1, own, -torch.inf).logsumexp(1) - math.log(len(W) - 1)
        loss.index_add_(0, label[part], -target)
        margin.index_add_(0, label[part], logits.gather(1, own).squeeze(1) - others)
    return TrainedTable(
        training=training,
        weight_decay=weight_decay,
        features=features,
        W=W,
        loss=loss / contexts,
        margin=margin / contexts,
        batches=batches,
    )
