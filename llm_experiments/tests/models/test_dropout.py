"""Dropout against a forward pass written out, and label smoothing through a whole step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from llm_experiments.models.dropout import add_dropout, seed_dropout
from llm_experiments.models.presets import build_model, features
from llm_experiments.training.loop import token_losses

RATE = 0.3
IDS = torch.arange(24).reshape(2, 12) + 5  # no special token


def model_with_dropout(name: str, rate: float = RATE) -> PreTrainedModel:
    model = build_model(name, vocab_size=300, dtype=torch.float64)
    add_dropout(model, rate)
    return model


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """But for rounding: Qwen2 takes its norms in float32 in a model of any type."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["openelm-tiny", "qwen2-tiny"])
def test_it_is_the_forward_pass_written_out(name: str) -> None:
    """What a layer adds without dropout is masked and rescaled by hand, with the same draws."""
    plain = build_model(name, vocab_size=300, dtype=torch.float64)
    seed_dropout(4, 7)
    got = features(model_with_dropout(name), IDS)
    seed_dropout(4, 7)
    added: list[torch.Tensor] = []

    def masked(x: torch.Tensor) -> torch.Tensor:
        keep = torch.empty_like(x).bernoulli_(1 - RATE)
        return x * keep / (1 - RATE)

    def replaced(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        added.append(first)
        return (masked(first), *output[1:]) if isinstance(output, tuple) else masked(first)

    body = plain.base_model
    for layer in body.layers:
        for part in layer.children():
            if "norm" not in type(part).__name__.lower():
                part.register_forward_hook(replaced)
    embeddings = masked(plain.get_input_embeddings()(IDS))
    expected = body(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    assert len(added) == 2 * len(body.layers)
    close(got, expected)


@pytest.mark.parametrize("name", ["openelm-tiny", "qwen2-tiny"])
def test_evaluation_is_without(name: str) -> None:
    model = model_with_dropout(name).eval()
    plain = build_model(name, vocab_size=300, dtype=torch.float64)
    close(features(model, IDS), features(plain, IDS))


def test_masks_are_a_function_of_seed_and_batch() -> None:
    model = model_with_dropout("openelm-tiny")
    drawn = {}
    for key in ((0, 0), (0, 1), (1, 0), (0, 0)):
        torch.rand(5)  # whatever else was drawn before
        seed_dropout(*key)
        first = drawn.setdefault(key, features(model, IDS))
        torch.rand(3)
        seed_dropout(*key)
        close(features(model, IDS), first)
    assert len({x.sum().item() for x in drawn.values()}) == 3


def test_a_rate_of_0_adds_nothing() -> None:
    model = model_with_dropout("qwen2-tiny", 0.0)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_smoothed_step_records_plain_losses() -> None:
    model = build_model("qwen2-tiny", vocab_size=300, dtype=torch.float64)
    weights = torch.linspace(0.5, 2, 300, dtype=torch.float64)
    losses, targets = token_losses(model, IDS, weights, label_smoothing=0.2)
    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    close(losses.loss, F.cross_entropy(logits, targets, reduction="none"))
    soft = torch.full_like(logits, 0.2 / 300)
    soft[torch.arange(len(targets)), targets] += 0.8
    by_hand = -(soft * logits.log_softmax(-1)).sum(-1)
    close(losses.objective, (weights[targets] * by_hand).mean())
