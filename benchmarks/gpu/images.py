"""ResNet9 on a GPU: its full recipe, and images a second beside a plain DataLoader loop."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.gpu.parts import Record, Settings, temporary_attempt
from benchmarks.vision_training import images_per_second, ours, plain, random_images
from vision_appendix.configs import DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import load_images
from vision_appendix.training import train

# Precision, whether a step's network is compiled, and the seed: most telling first.
_RUNS = (
    *(("bfloat16", True, 0), ("bfloat16", False, 0), ("float32", False, 0)),
    *(("bfloat16", True, seed) for seed in range(1, 5)),
)


def vision(settings: Settings, record: Record) -> None:
    """Full runs of the recipe, which most targets are about, then some steps of both loops.

    The first compiled run has the compilation in its time, the later ones have not.
    Of the plain loop a part of an epoch is enough for images a second: it is the slowest by far.
    On a GPU the targets are 94 % of CIFAR-10, in 15 s in the fastest way, and five times the
    plain loop.
    """
    on_gpu = settings.device.type == "cuda"
    if settings.cifar10:
        data = load_images(DataConfig(dataset="cifar10", data_dir=Path(settings.cifar10)))
    else:
        data = random_images(settings.images)
    data = data.to(settings.device)
    record.figure("images", settings.cifar10 or "random: accuracy means nothing")
    accuracies: dict[str, list[float]] = defaultdict(list)
    fastest, speed = math.inf, []
    plainest = RunConfig(
        width=settings.image_width,
        batch_size=settings.image_batch,
        epochs=settings.epochs,
        weight_decay=5e-4,
    )
    for precision, compiled, seed in _RUNS:
        name = precision + (", compiled" if compiled else "")
        config = replace(plainest, precision=precision, compile=compiled, seed=seed)
        begin = time.perf_counter()
        with temporary_attempt(asdict(config)) as mine:
            train(config, data, mine)
            seconds = time.perf_counter() - begin
            accuracies[name].append(mine.run.scalars()[-1]["test_accuracy"])
        fastest = min(fastest, seconds)
        record.figure(f"{name}, seed {seed}: seconds, evaluations included", seconds)
        record.figure(f"{name}, seed {seed}: test accuracy", accuracies[name][-1])
        mean = statistics.mean(accuracies[name])
        if seed:
            record.figure(f"{name}: test accuracy, mean of seeds", mean)
            record.figure(f"{name}: test accuracy, std", statistics.stdev(accuracies[name]))
        if on_gpu and settings.cifar10:
            record.check(f"{name}: test error", 1 - mean, 0.06)
    if on_gpu:
        record.check("seconds of a full run in the fastest way", fastest, 15)
    steps = settings.warm_up + settings.steps
    for name, loop in (
        ("ours", ours(plainest, data, steps)),
        ("plain DataLoader loop", plain(plainest, data, steps, settings.workers)),
    ):
        speed.append(images_per_second(loop, plainest, settings.device, settings.warm_up))
        record.figure(f"float32: images/s, {name}", speed[-1])
    if on_gpu:
        record.check("images/s of the plain DataLoader loop over ours", speed[1] / speed[0], 1 / 5)
