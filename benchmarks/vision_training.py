"""Images a second of vision_appendix against a plain DataLoader loop, same network and batches.

    python benchmarks/vision_training.py --data-dir FOLDER --width 4 --batch-size 512 --threads 2

The plain loop is what torchvision's documentation shows: CIFAR10 images as PIL, the transforms
RandomCrop, RandomHorizontalFlip, ToTensor, Normalize, RandomErasing on each, a DataLoader, and
the per-class metrics kept by a dictionary as in the paper's Algorithm 1. Both make the same
number of steps on the same network, loss and optimizer; the clock starts after the first ones
and stops when the device is done. Without --data-dir the images are random: neither loop looks
at what is in them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from frequency_bins import ClassMetrics
from vision_appendix.configs import DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages, load_images
from vision_appendix.training import (
    arithmetic,
    build,
    evaluation_steps,
    learning_rate,
    synchronise,
    training_step,
)


class PlainImages(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: a PIL image, transformed on every access."""

    def __init__(self, data: LabelledImages) -> None:
        self.pixels, self.labels = data.images.cpu().numpy(), data.labels.tolist()
        mean, std = (data.pixel_mean / 255).tolist(), (data.pixel_std / 255).tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
                transforms.RandomErasing(p=1.0, scale=(1 / 16, 1 / 16), ratio=(1.0, 1.0)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def ours(config: RunConfig, data: LabelledImages, steps: int) -> Iterator[None]:
    """Yields after every step."""
    model, optimizer = build(config, data)
    metrics = ClassMetrics(10, data.images.device)
    for step in range(steps):
        training_step(config, data, model, optimizer, metrics, step)
        yield


def plain(config: RunConfig, data: LabelledImages, steps: int, workers: int) -> Iterator[None]:
    """Yields after every step."""
    model, optimizer = build(config, data)
    total = evaluation_steps(config, len(data.images))[-1]
    metrics: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    device = data.images.device
    loader = DataLoader(
        PlainImages(data),
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        # Whatever way this process was started: any other copies all images to every worker.
        multiprocessing_context="fork" if workers else None,
        pin_memory=device.type == "cuda",
    )
    step = 0
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, total)
            with arithmetic(config, device):
                logits = model(images)
            losses = cross_entropy(logits.float(), labels, reduction="none")
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            right = logits.argmax(dim=1) == labels
            for k, loss, correct in zip(
                labels.tolist(), losses.tolist(), right.tolist(), strict=True
            ):
                seen = metrics[k]
                seen[0], seen[1], seen[2] = seen[0] + 1, seen[1] + loss, seen[2] + correct
            yield
            step += 1
            if step == steps:
                return


def images_per_second(
    loop: Iterator[None], config: RunConfig, device: torch.device, warm_up: int
) -> float:
    """Images a second after `warm_up` steps."""
    steps = 0
    for step, _ in enumerate(loop, start=1):
        if step == warm_up:
            synchronise(device)
            begin = time.perf_counter()
        steps = step
    synchronise(device)
    return (steps - warm_up) * config.batch_size / (time.perf_counter() - begin)


def random_images(number: int = 50_000) -> LabelledImages:
    """Images of CIFAR-10's size, a fifth of them for the test."""
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8))
    labels = torch.arange(number) % 10
    return LabelledImages(
        images=pixels,
        labels=labels,
        test_images=pixels[: number // 5],
        test_labels=labels[: number // 5],
        pixel_mean=torch.full((3,), 127.5),
        pixel_std=torch.full((3,), 73.6),
        class_names=tuple(map(str, range(10))),
        data_hash="random",
    )


def main() -> None:
    """Print images a second of both loops, mean and standard deviation over repeats."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="DataLoader processes")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    whole = DataConfig(dataset="cifar10", data_dir=options.data_dir)
    data = (load_images(whole) if options.data_dir else random_images()).to(device)
    config = RunConfig(
        width=options.width, batch_size=options.batch_size, precision=options.precision
    )
    steps = options.warm_up + options.steps
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{options.threads} threads"
    print(f"width {config.width}, batch {config.batch_size}, {config.precision}, {name}")
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(options.repeats):  # in turns, so that both meet the same neighbours
        for loop, seen in rates.items():
            if loop == "ours":
                training = ours(config, data, steps)
            else:
                training = plain(config, data, steps, options.workers)
            seen.append(images_per_second(training, config, device, options.warm_up))
    for loop, seen in rates.items():
        spread = statistics.stdev(seen) if len(seen) > 1 else float("nan")
        print(f"{loop:6} {statistics.mean(seen):12,.0f} images/s  (std {spread:,.0f})")
    ratio = statistics.mean(rates["ours"]) / statistics.mean(rates["plain"])
    print(f"ratio  {ratio:12.2f}")


if __name__ == "__main__":
    main()
