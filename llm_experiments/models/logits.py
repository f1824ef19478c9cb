"""Losses out of the logits of somebody else's model: Algorithm 1 of the paper without its loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_experiments.models.loss_head import IGNORE_INDEX, largest_and_correct

# Logits that are copied to float32 at a time.
_CHUNK_ELEMENTS = 2**22


class Predictions(NamedTuple):
    """Of N next tokens: cross-entropy in nats (0 where ignored), target, and whether predicted."""

    loss: Tensor
    target: Tensor
    correct: Tensor


@torch.no_grad()
def next_token_predictions(logits: Tensor, labels: Tensor, *, half: bool) -> Predictions:
    """How position t of logits (B, T, V) predicts label t + 1 of labels (B, T), N = B (T - 1).

    Softmax and losses are float32 or wider; a part of the logits is copied at a time. Labels of
    IGNORE_INDEX are no targets. ``half``: the logits are products in half precision, whatever their
    type is now; see `largest_and_correct`.
    """
    target = labels[:, 1:].to(logits.device)
    parts = [(_losses(*part), _correct(*part, half)) for part in _parts(logits, target)]
    return Predictions(
        loss=torch.cat([loss for loss, _ in parts]),
        target=target.flatten(),
        correct=torch.cat([correct for _, correct in parts]),
    )


def _parts(logits: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of the sequences, in their order; all together would have to be copied."""
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    for sequence, aim in zip(logits[:, :-1], target, strict=True):
        yield from zip(sequence.split(size), aim.split(size), strict=True)


def _losses(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, target, reduction="none", ignore_index=IGNORE_INDEX)


def _correct(logits: Tensor, target: Tensor, half: bool) -> Tensor:
    aim = target.clamp(min=0)[:, None]  # IGNORE_INDEX is no index
    return largest_and_correct(logits, aim, first_of_equals=half)[1][:, 0] & (target == aim[:, 0])
