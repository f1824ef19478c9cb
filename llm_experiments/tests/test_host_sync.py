"""On a GPU nothing waits for the device, or lies on the other one, between two evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from frequency_bins import ClassMetrics, Run, attempt
from frequency_bins.tests.fake_gpu import GPU, CopiedToHostError, fake_gpu
from llm_experiments import training
from llm_experiments.configs import RunConfig
from llm_experiments.models.presets import build_model
from llm_experiments.preparation import PreparedCorpus


class EvaluatedError(Exception):
    """The whole training set was evaluated, and its figures are asked for."""


@pytest.fixture
def steps_on_a_gpu(
    corpus: PreparedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[RunConfig], list[int]]:
    """A function that trains on a fake GPU up to the first figures, and gives the steps done."""

    def train(config: RunConfig) -> list[int]:
        weights = torch.ones(corpus.vocab_size, dtype=torch.float64)
        assert len(corpus.class_counts) == corpus.vocab_size  # and is kept: it is made of values
        model = build_model(config.model, vocab_size=corpus.vocab_size, device="meta")
        monkeypatch.setattr(training, "build_model", lambda *names, **options: model)
        monkeypatch.setattr(training, "loss_weights", lambda *counts: weights)
        monkeypatch.setattr(training, "synchronise", lambda device: None)
        steps: list[int] = []
        with attempt(Run.create(tmp_path, {"fake": 1})) as mine, fake_gpu(model):
            training.train(
                config,
                corpus,
                mine,
                device=GPU,
                report=lambda progress: steps.append(progress.step),
            )
        return steps

    return train


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["openelm-tiny", "qwen2-tiny"])
def test_steps_and_evaluations_neither_wait_nor_mix_devices(
    model: str,
    precision: Any,
    steps_on_a_gpu: Callable[[RunConfig], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def append(windows: object, step: int, metrics: ClassMetrics, **passes: ClassMetrics) -> float:
        assert metrics.device.type == passes["full"].device.type == GPU.type
        seen.append(step)
        raise EvaluatedError

    monkeypatch.setattr(training.WindowHistory, "append", append)
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
    )
    with pytest.raises(EvaluatedError):
        steps_on_a_gpu(config)
    assert seen == [3]


LOOKS: dict[type[Exception], Callable[[torch.Tensor], object]] = {
    DataDependentOutputException: lambda losses: losses.sum().item(),
    CopiedToHostError: lambda losses: losses.cpu(),
}


@pytest.mark.parametrize("error", LOOKS)
def test_a_look_at_the_losses_would_be_noticed(
    error: type[Exception],
    steps_on_a_gpu: Callable[[RunConfig], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update = ClassMetrics.update

    def looking(metrics: ClassMetrics, losses: torch.Tensor, *rest: Any, **options: Any) -> None:
        LOOKS[error](losses)
        update(metrics, losses, *rest, **options)

    monkeypatch.setattr(ClassMetrics, "update", looking)
    with pytest.raises(error):
        steps_on_a_gpu(RunConfig(steps=2, batch_size=4))
