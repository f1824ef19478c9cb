"""What is minimised and how: loss weights, decay groups, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llm_experiments.configs import DecayGroup, RunConfig
from llm_experiments.models.presets import classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loss_weights(class_counts: Tensor, exponent: float) -> Tensor:
    """Weights (V,) float64, a_k = count_k^-exponent scaled so that sum a_k count_k = sum count_k.

    A token that never occurs has no loss to weigh; its weight is 1.
    """
    counts = class_counts.double()
    weights = torch.where(counts > 0, counts.clamp(min=1) ** -exponent, 1)
    return weights * (counts.sum() / (weights * counts).sum())


def decay_group(model: PreTrainedModel, group: DecayGroup) -> list[nn.Parameter]:
    """The parameters that a decay group names, in the model's order.

    all: every one; matrices: no norms, no biases; embeddings: the input matrix; no-embeddings: all
    but it; head: the output matrix; body: neither input nor output matrix. A tied model has one
    matrix for input and output, so there head is embeddings, and body is no-embeddings.
    """
    embedding = model.get_input_embeddings().weight
    head = classifier(model)
    belongs: dict[DecayGroup, Callable[[nn.Parameter], bool]] = {
        "all": lambda parameter: True,
        "matrices": lambda parameter: parameter.ndim > 1,
        "embeddings": lambda parameter: parameter is embedding,
        "no-embeddings": lambda parameter: parameter is not embedding,
        "head": lambda parameter: parameter is head,
        "body": lambda parameter: parameter is not embedding and parameter is not head,
    }
    return [parameter for parameter in model.parameters() if belongs[group](parameter)]


def build_optimizer(model: PreTrainedModel, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW (or Adam with L2) with two groups: decayed and not; every parameter is in one."""
    decayed = decay_group(model, config.decay)
    chosen = {id(parameter) for parameter in decayed}
    free = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW if config.decay_mode == "decoupled" else torch.optim.Adam
    return optimizer(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up from 0, then a cosine to 0, as in transformers' cosine schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
