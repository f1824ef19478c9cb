"""On a GPU nothing waits for the device, or lies on the other one, between two evaluations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from frequency_bins import ClassMetrics
from run_store.tests.fake_gpu import GPU, WaitedError, fake_gpu, moved
from vision_appendix import training
from vision_appendix.configs import DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import load_images

CONFIG = RunConfig(width=2, batch_size=16, weight_decay=0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay_mode", ["l2", "decoupled"])
def test_steps_and_evaluations_neither_wait_nor_mix_devices(
    precision: Any, decay_mode: Any
) -> None:
    config = replace(CONFIG, precision=precision, decay_mode=decay_mode)
    data = load_images(DataConfig())
    model, optimizer = training.build(config, data)
    before = list(model.parameters())
    with fake_gpu(waiting=False), moved(model):
        after = dict(zip(before, model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [after[parameter] for parameter in group["params"]]
        data = data.to(GPU)
        metrics = ClassMetrics(10, GPU)
        for step in range(3):
            training.training_step(config, data, model, optimizer, metrics, step)
        test = training.evaluate(config, model, data, data.test_images, data.test_labels)
        assert metrics.loss.device == test.loss.device == GPU
        with pytest.raises(WaitedError):
            test.loss.sum().item()
