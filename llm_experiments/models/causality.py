"""Whether a model predicts the next token: a later token must not move what was said before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTHS = (2, 9)
# How far logits may move, of what they move where the token was changed. In a causal model rounding
# alone moves them, where tokens are sent to other experts: by 2e-6 in float32, on a CPU not at all
# in half precision, elsewhere by what a matrix product's shape does. In a small masked model as it
# is drawn at random, which passes little from token to token, they move by 5e-3 and more.
_MOST_MOVE, _MOST_MOVE_HALF, _MOST_MOVE_ON_DEVICE = 1e-4, 3e-3, 3e-2


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether logits stay where they are when a later token changes.

    Tried on two lengths with the last token changed, and one in the middle, whatever the model's
    class is called. Logits that are no numbers tell nothing, and pass.
    """
    size = model.get_input_embeddings().num_embeddings
    most = _MOST_MOVE
    if model.dtype.itemsize < 4:
        most = _MOST_MOVE_HALF if model.device.type == "cpu" else _MOST_MOVE_ON_DEVICE
    with evaluating(model):
        for length in _LENGTHS:
            ids = torch.randint(size, (length,), generator=torch.Generator().manual_seed(length))
            before = _logits(model, ids)
            for place in {length - 1, length // 2}:
                changed = ids.clone()
                changed[place] = (ids[place] + 1 + size // 3) % size
                moved = (_logits(model, changed) - before).abs().amax(dim=-1)
                if bool(moved[:place].max() > most * moved[place:].max()):
                    return False
    return True


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None].to(model.device)).logits[0].float()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A model without dropout; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
