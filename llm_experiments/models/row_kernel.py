"""Cross-entropy of rows of logits and its gradient in two passes over them: a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 4


@triton.jit
def _row(
    logits, target, scale, loss, smoothed, correct, width, num_classes, smoothing,
    SMOOTHED: tl.constexpr, FIRST_OF_EQUALS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the largest logit and the sum of exponentials, then the gradient over the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    aim = tl.load(target + row)
    of_target = tl.load(logits + aim).to(tl.float32)
    largest = -3.4e38  # not -inf, of which no difference may be taken
    total = 0.0
    summed = 0.0
    earlier = 0
    for start in range(0, num_classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_classes
        # Under a mask that ends between two multiples of 8 it would load one number at a time.
        x = tl.load(logits + column, mask=column < width).to(tl.float32)
        x = tl.where(inside, x, -float("inf"))
        before = largest
        largest = tl.maximum(before, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
        if SMOOTHED:
            summed += tl.sum(tl.where(inside, x, 0.0), 0)
        if FIRST_OF_EQUALS:
            earlier += tl.sum(((x == of_target) & (column < aim)).to(tl.int32), 0)
    tl.store(correct + row, (of_target == largest) & (earlier == 0))
    of_target -= largest
    tl.store(loss + row, tl.log(total) - of_target)
    if SMOOTHED:
        mean = summed / num_classes - largest
        tl.store(smoothed + row, tl.log(total) - of_target - smoothing * (mean - of_target))
    if GRADIENT:
        weight = tl.load(scale + row)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < num_classes
            x = tl.load(logits + column, mask=column < width).to(tl.float32)
            x = tl.where(inside, x, -float("inf"))
            gradient = tl.exp(x - largest) * (weight / total)
            gradient += tl.where(column == aim, (smoothing - 1) * weight, 0.0)
            if SMOOTHED:
                gradient -= tl.where(inside, smoothing / num_classes * weight, 0.0)
            tl.store(logits + column, gradient, mask=column < width)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    scale: Tensor,
    smoothing: float,
    num_classes: int,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `llm_experiments.models.loss_head.cross_entropy`; softmax and losses are float32."""
    loss = torch.empty_like(target, dtype=torch.float32)
    smoothed = torch.empty_like(loss) if smoothing else loss
    correct = torch.empty_like(target, dtype=torch.bool)
    half = logits.dtype is not torch.float32
    _row[(len(logits),)](
        logits, target, scale, loss, smoothed, correct, logits.shape[1], num_classes, smoothing,
        SMOOTHED=smoothing > 0, FIRST_OF_EQUALS=half, GRADIENT=gradient,
        BLOCK=_BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    return loss, smoothed, correct, logits
