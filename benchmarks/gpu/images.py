"""ResNet9 on a GPU: its full recipe, and images a second beside a plain DataLoader loop."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.parts import Record, Settings, temporary_attempt
from benchmarks.vision_training import images_per_second, ours, plain, random_images
from vision_appendix.configs import DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import load_images
from vision_appendix.training import train


def vision(settings: Settings, record: Record) -> None:
    """The recipe in both precisions, which most targets are about, then some steps of both loops.

    Of the plain loop a part of an epoch is enough for images a second: it is the slowest by far.
    On a GPU the targets are 94 % of CIFAR-10, in 15 s at the faster precision, and five times the
    plain loop.
    """
    on_gpu = settings.device.type == "cuda"
    if settings.cifar10:
        data = load_images(DataConfig(dataset="cifar10", data_dir=Path(settings.cifar10)))
    else:
        data = random_images(settings.images)
    data = data.to(settings.device)
    record.figure("images", settings.cifar10 or "random: accuracy means nothing")
    seconds, speed = [], []
    for precision in ("bfloat16", "float32"):
        config = RunConfig(
            width=settings.image_width,
            batch_size=settings.image_batch,
            epochs=settings.epochs,
            precision=precision,
            weight_decay=5e-4,
        )
        begin = time.perf_counter()
        with temporary_attempt(asdict(config)) as mine:
            train(config, data, mine)
            seconds.append(time.perf_counter() - begin)
            accuracy = mine.run.scalars()[-1]["test_accuracy"]
        record.figure(f"{precision}: seconds of a full run, evaluations included", seconds[-1])
        record.figure(f"{precision}: test accuracy", accuracy)
        if on_gpu and settings.cifar10:
            record.check(f"{precision}: test error", 1 - accuracy, 0.06)
    if on_gpu:
        record.check("seconds of a full run at the faster precision", min(seconds), 15)
    steps = settings.warm_up + settings.steps
    for name, loop in (
        ("ours", ours(config, data, steps)),
        ("plain DataLoader loop", plain(config, data, steps, settings.workers)),
    ):
        speed.append(images_per_second(loop, config, settings.device, settings.warm_up))
        record.figure(f"float32: images/s, {name}", speed[-1])
    if on_gpu:
        record.check("images/s of the plain DataLoader loop over ours", speed[1] / speed[0], 1 / 5)
