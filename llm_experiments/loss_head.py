"""Classifier and cross-entropy in one step, chunk by chunk, keeping no (N, V) matrix.

The loss of every token is exact: no gradient is filtered, no probability floored. (Skipping small
gradients, as some fused heads do, would bias just the rare classes that this project measures.)

torch 2.14 has `torch.nn.functional.linear_cross_entropy`, chunked too, which is not used: with a
mean it keeps the losses of the tokens to itself, without one it forms the logits a second time in
the backward pass, and in neither does it tell whether the target was the largest logit. A test
compares the two, `benchmarks/llm_training.py` times them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
# Logits held at a time. 2^18 float32 are 1 MiB, which stays in a CPU core's cache; a GPU wants
# larger products. With fewer rows, adding up the (V, D) gradient costs more than the products.
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
_LEAST_ROWS = 128
# Rows of the classifier are padded to a multiple of this: with an odd number of bf16 or fp16 logits
# a row, a GPU's matrix units find no two rows aligned and fall back to slow products.
_MULTIPLE = {"cuda": 64}


class TokenLosses(NamedTuple):
    """What the head gives for N targets.

    objective: scalar, sum of weight * (smoothed) loss; the one entry that gradients flow through.
    loss: (N,) cross-entropy in nats, float32 or wider; 0 where the target is IGNORE_INDEX.
    correct: (N,) whether the target is the prediction: no logit is larger than its own. Of equal
        largest logits the first is the prediction in half precision, where rounding makes many of
        them; in float32 and wider, where they hardly occur, each counts as one.
    """

    objective: Tensor
    loss: Tensor
    correct: Tensor


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
        padding = -len(weight) % _MULTIPLE.get(features.device.type, 1)
        if padding:
            factor = F.pad(factor, (0, 0, 0, padding))
        d_features = torch.empty_like(features) if with_gradient else None
        d_weight = torch.zeros_like(factor, dtype=wide) if with_gradient else None
        valid = targets != IGNORE_INDEX
        safe_targets = torch.where(valid, targets, 0)[:, None]
        scale = torch.where(valid, token_weight.to(wide), 0)[:, None]
        rows = max(_LEAST_ROWS, _CHUNK_ELEMENTS.get(features.device.type, 2**18) // len(factor))
        for start in range(0, len(features), rows):
            part = slice(start, start + rows)
            target = safe_targets[part]
            logits = (features[part] @ factor.T).to(wide)
            logits[:, len(weight) :] = -torch.inf
            if features.dtype == wide:  # finding where the maximum is takes longer than its value
                logits -= logits.amax(dim=-1, keepdim=True)
                target_logit = logits.gather(1, target)
                correct[part] = (target_logit == 0)[:, 0]
            else:
                largest, argmax = logits.max(dim=-1, keepdim=True)
                logits -= largest
                target_logit = logits.gather(1, target)
                correct[part] = (argmax == target)[:, 0]
            mean_logit = logits[:, : len(weight)].mean(dim=-1, keepdim=True) if smoothing else None
            total = logits.exp_().sum(dim=-1, keepdim=True)
            losses[part] = (total.log() - target_logit)[:, 0]
            if mean_logit is not None:
                smoothed[part] = (total.log() - target_logit.lerp(mean_logit, smoothing))[:, 0]
            if d_features is not None and d_weight is not None:
                gradient = logits.mul_(scale[part] / total)
                gradient.scatter_add_(1, target, (smoothing - 1) * scale[part])
                if smoothing:
                    gradient[:, : len(weight)] -= smoothing / len(weight) * scale[part]
                gradient = gradient.to(features.dtype)
                d_features[part] = gradient @ factor
                if gradient.dtype == wide:
                    d_weight.addmm_(gradient.T, features[part])
                else:
                    d_weight += gradient.T @ features[part]
        losses.masked_fill_(~valid, 0)
        correct &= valid
        if d_features is not None and d_weight is not None:
            ctx.save_for_backward(d_features, d_weight[: len(weight)].to(weight.dtype))
        ctx.mark_non_differentiable(losses, correct)
        return (smoothed * scale[:, 0]).sum(), losses, correct

    @staticmethod
    def backward(ctx: Any, d_objective: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_features, d_weight = ctx.saved_tensors
        scale = d_objective.to(d_weight.dtype)
        return d_features * scale.to(d_features.dtype), d_weight * scale, None, None, None
