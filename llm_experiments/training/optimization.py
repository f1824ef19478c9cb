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
    but it; head: the output matrix; body: neither input nor output matrix; last-norm: the gain of
    the norm before the head; inner: the body but for that. A tied model has one matrix for input
    and output, so there head is embeddings, and body is no-embeddings.
    """
    embedding = model.get_input_embeddings().weight
    head = classifier(model)
    gain = model.base_model.norm.weight
    belongs: dict[DecayGroup, Callable[[nn.Parameter], bool]] = {
        "all": lambda parameter: True,
        "matrices": lambda parameter: parameter.ndim > 1,
        "embeddings": lambda parameter: parameter is embedding,
        "no-embeddings": lambda parameter: parameter is not embedding,
        "head": lambda parameter: parameter is head,
        "body": lambda parameter: parameter is not embedding and parameter is not head,
        "last-norm": lambda parameter: parameter is gain,
        "inner": lambda parameter: all(parameter is not p for p in (embedding, head, gain)),
    }
    return [parameter for parameter in model.parameters() if belongs[group](parameter)]


def build_optimizer(model: PreTrainedModel, config: RunConfig) -> torch.optim.Optimizer:
    """The config's optimizer with two groups: decayed and not; every parameter is in one."""
    decayed = decay_group(model, config.decay)
    chosen = {id(parameter) for parameter in decayed}
    free = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    shared = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.beta1, fused=True, **shared)
    if config.optimizer == "sign":
        return SignDescent(groups, momentum=config.beta1, **shared)
    adam = torch.optim.AdamW if config.decay_mode == "decoupled" else torch.optim.Adam
    return adam(groups, betas=(config.beta1, config.beta2), fused=True, **shared)


class SignDescent(torch.optim.SGD):
    """m <- beta m + g, then w <- (1 - lr decay) w - lr sign(m): a step of one size everywhere.

    signSGD with momentum (Bernstein et al., 2018) and decoupled decay: AdamW without any memory of
    the size of gradients. Its state and settings are those of SGD.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with the gradients that there are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    mean = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(mean.sign(), alpha=group["lr"])


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up from 0, then the schedule, as in transformers' schedules of these names."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    shares = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }
    return config.learning_rate * shares[config.schedule]
