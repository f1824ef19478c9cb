"""On a GPU nothing waits for the device, or lies on the other one, between two evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from frequency_bins import ClassMetrics
from frequency_bins.tests.fake_gpu import GPU, CopiedToHostError, fake_gpu
from vision_appendix import training
from vision_appendix.configs import DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages, load_images

CONFIG = RunConfig(width=2, batch_size=16, weight_decay=0.1)


@contextmanager
def on_a_gpu(
    config: RunConfig,
) -> Iterator[tuple[LabelledImages, torch.nn.Module, torch.optim.Optimizer]]:
    data = load_images(DataConfig())
    model, optimizer = training.build(config, data)
    before = list(model.parameters())
    with fake_gpu(model):
        moved = dict(zip(before, model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [moved[parameter] for parameter in group["params"]]
            group["fused"] = False  # torch has no fake of that kernel
        yield data.to(GPU), model, optimizer


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay_mode", ["l2", "decoupled"])
def test_steps_and_evaluations_neither_wait_nor_mix_devices(
    precision: Any, decay_mode: Any
) -> None:
    config = replace(CONFIG, precision=precision, decay_mode=decay_mode)
    with on_a_gpu(config) as (data, model, optimizer):
        metrics = ClassMetrics(10, GPU)
        for step in range(3):
            training.training_step(config, data, model, optimizer, metrics, step)
        test = training.evaluate(config, model, data, data.test_images, data.test_labels)
        assert metrics.loss.device.type == test.loss.device.type == GPU.type


def test_a_look_at_a_loss_would_be_noticed() -> None:
    with on_a_gpu(CONFIG) as (data, model, _):
        losses = training.evaluate(CONFIG, model, data, data.test_images, data.test_labels).loss
        with pytest.raises(DataDependentOutputException):
            losses.sum().item()
        with pytest.raises(CopiedToHostError):
            losses.cpu()
