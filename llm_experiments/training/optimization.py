"""What is minimised and how: loss weights, decay groups, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_experiments.configs import DecayGroup, RunConfig
from llm_experiments.models.presets import classifier
from llm_experiments.training.optimizers import Lion, MuonAndAdamW, OwnDecay, SignDescent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loss_weights(class_counts: Tensor, exponent: float) -> Tensor:
    """Weights (V,) float64, a_k = count_k^-exponent scaled so that sum a_k count_k = sum count_k.

    A token that never occurs has no loss to weigh; its weight is 1 before scaling. Raises
    ValueError for an exponent whose powers float64 cannot hold.
    """
    counts = class_counts.double()
    weights = torch.where(counts > 0, counts.clamp(min=1) ** -exponent, 1)
    weights = weights * (counts.sum() / (weights * counts).sum())
    return _held("loss_weight_exponent", exponent, weights)


def _held(name: str, exponent: float, values: Tensor) -> Tensor:
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ValueError(f"{name} is {exponent:g}; expected one whose powers float64 can hold")
    return values


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


def row_decays(class_counts: Tensor, exponent: float) -> Tensor:
    """Decay of each row relative to the mean over them: (V,) float64, count_k^exponent, mean 1.

    A token that never occurs counts as one that occurs once. Raises ValueError for an exponent
    whose powers float64 cannot hold.
    """
    counts = class_counts.double().clamp(min=1)
    powers = (counts / counts.max()) ** exponent  # no power of a positive exponent overflows
    shares = powers / powers.mean()
    return _held("decay_exponent", exponent, shares)


def check_row_decays(config: RunConfig, class_counts: Tensor) -> None:
    """ValueError where a step's decay would turn a row's sign: a rate of 1 or more; or as above."""
    most = float(row_decays(class_counts, config.decay_exponent).max())
    if config.decay_exponent and (rate := config.learning_rate * config.weight_decay * most) >= 1:
        raise ValueError(
            f"decay_exponent {config.decay_exponent:g} decays a row by {rate:.3g} of itself in a "
            f"step at weight decay {config.weight_decay:g}; expected less than 1"
        )


def build_optimizer(
    model: PreTrainedModel, config: RunConfig, class_counts: Tensor | None = None
) -> torch.optim.Optimizer:
    """The config's optimizer with groups decayed and not; every parameter is in exactly one.

    With muon the matrices of the body (neither embeddings nor head; the experts of a mixture, which
    lie stacked in three dimensions, are none) are Muon's, and all else is AdamW's. A decay_exponent
    asks for `class_counts` (V,). Raises what `row_decays` raises.
    """
    decayed = decay_group(model, config.decay)
    chosen = {id(parameter) for parameter in decayed}
    free = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    cautious = config.optimizer == "adamw-cautious"
    own = cautious or bool(config.decay_exponent) or config.decay_until < 1
    groups = [
        {"params": decayed, "weight_decay": 0.0 if own else config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    optimizer = _of_groups(model, config, [group for group in groups if group["params"]])
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    if own:
        shares: dict[int, Tensor] = {}
        if config.decay_exponent:
            assert class_counts is not None
            rows = row_decays(class_counts, config.decay_exponent)
            shares = {id(model.get_input_embeddings().weight): rows, id(classifier(model)): rows}
        OwnDecay(optimizer, decayed, config.weight_decay, shares=shares, cautious=cautious)
    return optimizer


def _of_groups(
    model: PreTrainedModel, config: RunConfig, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer:
    shared = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    betas = (config.beta1, config.beta2)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.beta1, fused=True, **shared)
    if config.optimizer == "sign":
        return SignDescent(groups, momentum=config.beta1, **shared)
    if config.optimizer == "lion":
        groups = [group | {"beta2": config.beta2} for group in groups]
        return Lion(groups, momentum=config.beta1, **shared)
    if config.optimizer == "muon":
        tables = {id(model.get_input_embeddings().weight), id(classifier(model))}
        parts: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for group in groups:
            for of_muon, held in parts.items():
                members = [
                    p for p in group["params"] if (p.ndim == 2 and id(p) not in tables) is of_muon
                ]
                held += [group | {"params": members}] if members else []
        return MuonAndAdamW(parts[True], parts[False], betas=betas, **shared)
    adam = torch.optim.AdamW if config.decay_mode == "decoupled" else torch.optim.Adam
    return adam(groups, betas=betas, fused=True, **shared)


def set_step(optimizer: torch.optim.Optimizer, config: RunConfig, step: int) -> None:
    """Give the optimizer a step's learning rate, and whether it still decays."""
    for settings in optimizer.param_groups:
        settings["lr"] = learning_rate(config, step)
    optimizer.decay_is_on = step < round(config.decay_until * config.steps)


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
