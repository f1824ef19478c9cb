"""On a GPU nothing waits for the device, or lies on the other one, between two evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from frequency_bins import ClassMetrics
from llm_experiments.configs import RunConfig
from llm_experiments.models import loss_head
from llm_experiments.models.presets import build_model
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training import loop
from run_store import Run, attempt
from run_store.tests.fake_gpu import GPU, WaitedError, fake_gpu, moved


class EvaluatedError(Exception):
    """The whole training set was evaluated, and its figures are asked for."""


@pytest.fixture
def train_on_a_gpu(
    corpus: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[RunConfig], None]:
    """A function that trains, from its first step on a fake GPU that is not to be waited for."""

    def train(config: RunConfig) -> None:
        weights = loop.loss_weights(corpus.class_counts, config.loss_weight_exponent)
        model = build_model(config.model, vocab_size=corpus.vocab_size)
        monkeypatch.setattr(loop, "build_model", lambda *names, **options: model)
        monkeypatch.setattr(loop, "loss_weights", lambda *counts: weights)
        monkeypatch.setattr(loop, "synchronise", lambda device: None)
        monkeypatch.setattr(loss_head, "_KERNEL", set())  # a fake GPU has no kernels
        with (
            attempt(Run.create(tmp_path, {"fake": 1})) as mine,
            fake_gpu(waiting=False),
            moved(model),
        ):
            loop.train(config, corpus, mine, device=GPU)

    return train


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["openelm-tiny", "qwen2-tiny"])
def test_steps_and_evaluations_neither_wait_nor_mix_devices(
    model: str,
    precision: Any,
    train_on_a_gpu: Callable[[RunConfig], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def append(windows: object, step: int, metrics: ClassMetrics, **passes: ClassMetrics) -> float:
        assert metrics.count.device == passes["full"].count.device == GPU
        seen.append(step)
        raise EvaluatedError

    monkeypatch.setattr(loop.WindowHistory, "append", append)
    config = RunConfig(
        model=model,
        precision=precision,
        steps=5,
        batch_size=4,
        accumulation=2,
        evaluate_every=3,
        evaluate="full",
        dropout=0.1,
        label_smoothing=0.1,
        weight_decay=0.1,
        clip_gradient=1.0,
        loss_weight_exponent=0.25,
    )
    with pytest.raises(EvaluatedError):
        train_on_a_gpu(config)
    assert seen == [3]


@pytest.mark.parametrize("look", [lambda x: x.sum().item(), torch.Tensor.cpu, torch.Tensor.nonzero])
def test_a_look_at_the_losses_would_be_noticed(
    look: Callable[[torch.Tensor], object],
    train_on_a_gpu: Callable[[RunConfig], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update = ClassMetrics.update

    def looking(metrics: ClassMetrics, losses: torch.Tensor, *rest: Any, **options: Any) -> None:
        look(losses)
        update(metrics, losses, *rest, **options)

    monkeypatch.setattr(ClassMetrics, "update", looking)
    with pytest.raises(WaitedError):
        train_on_a_gpu(RunConfig(steps=2, batch_size=4))
