"""Dropout for any model of transformers, the same whenever a step is done again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a decoder layer adds to its input, as OpenELM and Qwen2 call it.
_BRANCHES = ("attn", "ffn", "self_attn", "mlp")


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Drop entries of the embeddings and of what each layer's two branches add, as GPT-2 does.

    Only in training mode; a rate of 0 changes nothing. It is done with forward hooks, so the
    model's code, parameters and checkpoint stay as they are. Compile afterwards, not before.
    """

    if not rate:
        return

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # transformers' attention gives its weights too
            return (F.dropout(output[0], rate, module.training), *output[1:])
        return F.dropout(output, rate, module.training)

    branches = [
        getattr(layer, name)
        for layer in model.base_model.layers
        for name in _BRANCHES
        if hasattr(layer, name)
    ]
    for module in (model.get_input_embeddings(), *branches):
        module.register_forward_hook(drop)


def seed_dropout(seed: int, batch: int) -> None:
    """Make the masks of a batch a pure function of (seed, number of the batch) on a device."""
    state = np.random.SeedSequence((seed, batch)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))
