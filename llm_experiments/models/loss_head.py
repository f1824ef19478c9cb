"""Classifier and cross-entropy in one step, chunk by chunk, keeping no (N, V) matrix.

The loss of every token is exact: no gradient is filtered, no probability floored. (Skipping small
gradients, as some fused heads do, would bias just the rare classes that this project measures.)

torch 2.14 has `torch.nn.functional.linear_cross_entropy`, chunked too, which is not used: with a
mean it keeps the losses of the tokens to itself, without one it forms the logits a second time in
the backward pass, and in neither does it tell whether the target was the largest logit. A test
compares the two, `benchmarks/llm_training.py` times them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
# Logits held at a time. 2^20 float32 are 4 MiB, near a CPU core's cache, with products that are
# large enough for two cores; a GPU wants larger ones. With fewer rows, adding up the (V, D)
# gradient costs more than the products.
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}
_LEAST_ROWS = 128
# Rows of the classifier are padded to a multiple of this: with an odd number of bf16 or fp16 logits
# a row, a GPU's matrix units find no two rows aligned and fall back to slow products.
_MULTIPLE = {"cuda": 64}
# Devices on which a kernel goes over the logits twice, where torch does so some ten times.
_KERNEL = {"cuda"} if importlib.util.find_spec("triton") else set()


class TokenLosses(NamedTuple):
    """What the head gives for N targets.

    objective: scalar, sum of weight * (smoothed) loss; the one entry that gradients flow through.
    loss: (N,) cross-entropy in nats, float32 or wider; 0 where the target is IGNORE_INDEX.
    correct: (N,) whether the target is the prediction, see `largest_and_correct`.
    """

    objective: Tensor
    loss: Tensor
    correct: Tensor


def largest_and_correct(
    logits: Tensor, target: Tensor, *, first_of_equals: bool
) -> tuple[Tensor, Tensor]:
    """Largest of each row of logits (..., V), and whether target (..., 1) is the prediction.

    It is, where no logit is larger than its own. With ``first_of_equals`` only the first of equal
    largest logits is the prediction: for products in half precision, where rounding makes many of
    them. In float32 and wider they hardly occur, and finding where the maximum is takes longer than
    finding its value. Both results are (..., 1).
    """
    if first_of_equals:
        largest, argmax = logits.max(dim=-1, keepdim=True)
        return largest, argmax == target
    largest = logits.amax(dim=-1, keepdim=True)
    return largest, logits.gather(-1, target) == largest


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    label_smoothing: float = 0.0,
) -> TokenLosses:
    """Cross-entropy of ``features @ weight.T`` against ``targets``.

    Matrix products are done in the type of ``features``, softmax and losses in float32 or wider.

    Args:
        features: (N, D).
        weight: (V, D), the classifier; its gradient has its own type.
        targets: (N,) class indices, IGNORE_INDEX where there is none.
        token_weight: (N,) factor of each token's loss in the objective (1/N gives the mean).
        label_smoothing: the e of the objective's targets (1 - e) y + e/V; the losses that are
            returned are those of y.
    """
    objective, loss, correct = _LinearCrossEntropy.apply(
        features, weight, targets, token_weight, label_smoothing
    )
    return TokenLosses(objective, loss, correct)


def held_bytes(
    num_targets: int, num_classes: int, width: int, dtype: torch.dtype, device_type: str
) -> int:
    """Bytes that `linear_cross_entropy` holds at its peak, of N targets, V classes and width D.

    Counted are features of this type with their gradient and what grows with V, but for the
    classifier itself: in the forward pass its gradient, its copy in half precision (or padded) and
    a chunk of logits; in the backward pass its gradient twice, as formed and as scaled.
    """
    size = dtype.itemsize
    wide = max(size, 4)
    padding = _padding(num_classes, device_type)
    matrix = (num_classes + padding) * width
    chunk = min(num_targets, _rows(num_classes + padding, device_type)) * (num_classes + padding)
    forward = wide * matrix
    if size == wide:
        forward += size * (matrix * bool(padding) + chunk)
    else:  # a chunk is there in both types, or it has a part of the gradient beside it
        beside = 0 if device_type in _KERNEL else wide * chunk
        forward += size * (matrix + chunk) + max(beside, size * matrix)
    backward = wide * (matrix + num_classes * width)
    return 2 * size * num_targets * width + max(forward, backward)


def _padding(num_classes: int, device_type: str) -> int:
    """Rows to add to the classifier."""
    return -num_classes % _MULTIPLE.get(device_type, 1)


def _rows(num_classes: int, device_type: str) -> int:
    """Tokens whose logits are formed at a time."""
    return max(_LEAST_ROWS, _CHUNK_ELEMENTS.get(device_type, 2**20) // num_classes)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    scale: Tensor,
    smoothing: float,
    num_classes: int,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows of logits (n, V + padding) against target (n,), computed over the logits.

    Returns the cross-entropy, the same with label smoothing, and whether the target is predicted,
    each (n,); and the logits' gradient where ``gradient`` asks for it, row i times scale[i].
    """
    half = logits.dtype
    target, scale = target[:, None], scale[:, None]
    logits = logits.to(scale.dtype)
    logits[:, num_classes:] = -torch.inf
    narrow = half != logits.dtype
    largest, correct = largest_and_correct(logits, target, first_of_equals=narrow)
    logits -= largest
    of_target = logits.gather(1, target)
    mean = logits[:, :num_classes].mean(dim=-1, keepdim=True) if smoothing else of_target
    total = logits.exp_().sum(dim=-1, keepdim=True)
    loss = total.log() - of_target
    smoothed = total.log() - of_target.lerp(mean, smoothing) if smoothing else loss
    if gradient:
        logits.mul_(scale / total).scatter_add_(1, target, (smoothing - 1) * scale)
        if smoothing:
            logits[:, :num_classes] -= smoothing / num_classes * scale
    return loss[:, 0], smoothed[:, 0], correct[:, 0], logits.to(half) if gradient else logits


def _cross_entropy_for(features: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    if features.device.type not in _KERNEL or features.dtype is torch.float64:
        return cross_entropy
    from llm_experiments.models import row_kernel  # Triton takes a second to import

    return row_kernel.cross_entropy


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are formed in the forward pass, while a chunk's softmax is at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weight: Tensor,
        smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wide = torch.promote_types(features.dtype, torch.float32)
        losses = features.new_empty(len(features), dtype=wide)
        smoothed = torch.empty_like(losses) if smoothing else losses
        correct = torch.empty(len(features), dtype=torch.bool, device=features.device)
        factor = weight.to(features.dtype)
        if padding := _padding(len(weight), features.device.type):
            factor = F.pad(factor, (0, 0, 0, padding))
        d_features = torch.empty_like(features) if with_gradient else None
        d_weight = torch.zeros_like(factor, dtype=wide) if with_gradient else None
        valid = targets != IGNORE_INDEX
        safe_targets = torch.where(valid, targets, 0)
        scale = torch.where(valid, token_weight.to(wide), 0)
        rows = _rows(len(factor), features.device.type)
        cross_entropy = _cross_entropy_for(features)
        for start in range(0, len(features), rows):
            part = slice(start, start + rows)
            losses[part], smoothed[part], correct[part], gradient = cross_entropy(
                features[part] @ factor.T,
                safe_targets[part],
                scale[part],
                smoothing,
                len(weight),
                gradient=with_gradient,
            )
            if d_features is not None and d_weight is not None:
                d_features[part] = gradient @ factor
                if gradient.dtype == wide:
                    d_weight.addmm_(gradient.T, features[part])
                else:
                    d_weight += gradient.T @ features[part]
            del gradient  # so that it is not there beside the next chunk's logits
        losses.masked_fill_(~valid, 0)
        correct &= valid
        if d_features is not None and d_weight is not None:
            ctx.save_for_backward(d_features, d_weight[: len(weight)].to(weight.dtype))
        ctx.mark_non_differentiable(losses, correct)
        return (smoothed * scale).sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, d_objective: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_features, d_weight = ctx.saved_tensors
        scale = d_objective.to(d_weight.dtype)
        return d_features * scale.to(d_features.dtype), d_weight * scale, None, None, None
