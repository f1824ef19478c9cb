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
    """The recipe in both precisions, which the targets are about, then some steps of both loops.

    Of the plain loop a part of an epoch is enough for images a second: it is the slowest by far.
    """
    if settings.cifar10:
        data = load_images(DataConfig(dataset="cifar10", data_dir=Path(settings.cifar10)))
    else:
        data = random_images(settings.images)
    data = data.to(settings.device)
    record.figure("images", settings.cifar10 or "random: accuracy means nothing")
    seconds, accuracy, speed = {}, {}, {}
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
            seconds[precision] = time.perf_counter() - begin
            accuracy[precision] = mine.run.scalars()[-1]["test_accuracy"]
        name = f"{precision}: seconds of a full run, evaluations included"
        record.figure(name, seconds[precision])
        record.figure(f"{precision}: test accuracy", accuracy[precision])
    if settings.device.type == "cuda":
        check_recipe(record, seconds, accuracy if settings.cifar10 else {})
    steps = settings.warm_up + settings.steps
    for name, loop in (
        ("ours", ours(config, data, steps)),
        ("plain DataLoader loop", plain(config, data, steps, settings.workers)),
    ):
        speed[name] = images_per_second(loop, config, settings.device, settings.warm_up)
        record.figure(f"float32: images/s, {name}", speed[name])
    if settings.device.type == "cuda":
        check_ratio(record, speed["plain DataLoader loop"] / speed["ours"])


def check_recipe(record: Record, seconds: dict[str, float], accuracy: dict[str, float]) -> None:
    """On a GPU: 94 % of CIFAR-10, in 15 s at the faster precision."""
    for precision, found in accuracy.items():
        record.check(f"{precision}: test error", 1 - found, 0.06)
    record.check("seconds of a full run at the faster precision", min(seconds.values()), 15)


def check_ratio(record: Record, ratio: float) -> None:
    """On a GPU: 5 times the images a second of the plain loop."""
    record.check("images/s of the plain DataLoader loop over ours", ratio, 1 / 5)
