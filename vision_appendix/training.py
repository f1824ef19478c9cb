"""One run: train a ResNet9 from scratch and record the loss and accuracy of every class.

The loop is `train`; what it needs stands below it. B images, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from frequency_bins import ClassMetrics, WindowHistory
from run_store import (
    Attempt,
    Diverged,
    Stopped,
    checkpoints,
    class_record,
    write_atomically,
)
from run_store.checkpoint_writer import CheckpointWriter, snapshot
from run_store.clock import Clock
from vision_appendix.augmentation import normalise, training_batch
from vision_appendix.configs import RunConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages
from vision_appendix.last_layer import EVALUATION_BATCH, LAST_LAYER, last_layer
from vision_appendix.resnet9 import ResNet9


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: its step, and its training images a second."""

    step: int
    images_per_second: float


def train(
    config: RunConfig,
    data: LabelledImages,
    attempt: Attempt,
    *,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Train on `data` (on its device) to the end, or on from the checkpoint, and publish.

    On a CPU the record is bit-identical however often the run was interrupted. Beside it lies
    LAST_LAYER; see `vision_appendix.last_layer`.

    Raises:
        Diverged: the loss is not finite; nothing is published.
        Stopped: the attempt should stop, and there is a checkpoint to go on from.
    """
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    model, optimizer = build(config, data)
    metrics = ClassMetrics(len(data.class_names), data.images.device)
    windows = WindowHistory()
    parts = {"model": model, "optimizer": optimizer, "metrics": metrics, "windows": windows}
    step = checkpoints.resume(attempt, parts)
    evaluations = evaluation_steps(config, len(data.images))
    clock, first = Clock(config.batch_size, step), step

    def copy() -> dict[str, Any]:
        return {name: snapshot(part.state_dict()) for name, part in parts.items()}

    def look() -> None:
        if attempt.should_stop():
            writer.take(step)
            writer.wait()
            raise Stopped(f"stopped after step {step}")

    def evaluate_on(images: Tensor, labels: Tensor) -> ClassMetrics:
        with clock.paused():
            return evaluate(config, model, data, images, labels, look)

    with CheckpointWriter(attempt, step, evaluations[-1], copy) as writer:
        while True:
            if step in evaluations and step > windows.last_step:
                synchronise(data.images.device)
                test = evaluate_on(data.test_images, data.test_labels)
                scalars = windows.append(step, metrics, test=test)
                metrics.reset()
                if not math.isfinite(scalars["loss"]):
                    raise Diverged(f"the loss is {scalars['loss']} at step {step}")
                rates = {
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "images_per_second": clock.per_second(step),
                }
                attempt.append_scalars({"step": step, **scalars, **rates})
            if step > first:
                if step == evaluations[-1] or writer.is_due(step):
                    writer.take(step)
                look()
            if step == evaluations[-1]:
                break
            training_step(config, data, model, optimizer, metrics, step)
            step += 1
            report(Progress(step=step, images_per_second=clock.per_second(step)))

        final = evaluate_on(data.images, data.labels)
        with arithmetic(config, data.images.device):
            layer = last_layer(model, data, look)
        write_atomically(attempt.folder / LAST_LAYER, safetensors.torch.save(layer))
        speed = {"images_per_second": clock.per_second(step)} if step > first else {}
        record = class_record(
            class_counts=data.class_counts.numpy(), labels=data.class_names, **windows.arrays(final)
        )
        attempt.publish(record, files=(LAST_LAYER,), **speed)
        writer.discard()


def training_step(
    config: RunConfig,
    data: LabelledImages,
    model: ResNet9,
    optimizer: torch.optim.Optimizer,
    metrics: ClassMetrics,
    step: int,
) -> None:
    """One step of SGD on the mean cross-entropy of a batch, which `metrics` sees too."""
    rate = learning_rate(config, step, evaluation_steps(config, len(data.images))[-1])
    images, targets = training_batch(config, data, config.seed, step)
    with arithmetic(config, images.device):
        logits = model(images)
    losses = cross_entropy(logits.float(), targets, reduction="none")
    losses.mean().backward()
    metrics.update(losses, targets, logits.argmax(dim=1) == targets)
    for group in optimizer.param_groups:
        group["lr"] = rate
        if config.decay_mode == "decoupled" and group["decayed"]:
            with torch.no_grad():
                torch._foreach_mul_(group["params"], 1 - rate * config.weight_decay)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(
    config: RunConfig,
    model: ResNet9,
    data: LabelledImages,
    images: Tensor,
    labels: Tensor,
    look: Callable[[], object] = lambda: None,
) -> ClassMetrics:
    """One pass without augmentation: the loss and accuracy of every class.

    `look` is called after every batch, and may raise.
    """
    metrics = ClassMetrics(len(data.class_names), images.device)
    model.eval()
    for part, targets in zip(
        images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True
    ):
        with arithmetic(config, images.device):
            # Not compiled: that gained 1 ms of 29 on 10,000 images and took 4 s.
            logits = model.forward(normalise(data, part))
        losses = cross_entropy(logits.float(), targets, reduction="none")
        metrics.update(losses, targets, logits.argmax(dim=1) == targets)
        look()
    model.train()
    return metrics


def build(config: RunConfig, data: LabelledImages) -> tuple[ResNet9, torch.optim.Optimizer]:
    """The network, a function of the seed, and SGD with two groups: decayed and not.

    Where the config asks for it, calling the network compiles it; its `forward` is as it was.
    """
    model = ResNet9(
        width=config.width,
        in_channels=data.images.shape[-1],
        num_classes=len(data.class_names),
        seed=config.seed,
    )
    model = model.to(data.images.device, memory_format=torch.channels_last)
    if config.compile:
        model.compile(mode="reduce-overhead")
    head = model.classifier.weight
    decays: dict[str, Callable[[nn.Parameter], bool]] = {
        "all": lambda parameter: True,
        "matrices": lambda parameter: parameter.ndim > 1,
        "head": lambda parameter: parameter is head,
        "body": lambda parameter: parameter is not head,
    }
    groups = [
        {"params": [p for p in model.parameters() if decays[config.decay](p) == d], "decayed": d}
        for d in (True, False)
    ]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    in_gradient = config.weight_decay if config.decay_mode == "l2" else 0.0
    return model, torch.optim.SGD(
        [
            group | {"weight_decay": in_gradient if group["decayed"] else 0.0}
            for group in groups
            if group["params"]
        ],
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
        fused=True,
    )


def evaluation_steps(config: RunConfig, num_images: int) -> list[int]:
    """The steps after which a record is made: every `evaluate_every` epochs, and the last."""
    epochs = [*range(config.evaluate_every, config.epochs, config.evaluate_every), config.epochs]
    steps = [max(1, round(epoch * num_images / config.batch_size)) for epoch in epochs]
    return sorted(set(steps))


def learning_rate(config: RunConfig, step: int, steps: int) -> float:
    """Linear from 0 up to the peak and down to 0 again, taken in the middle of the step."""
    done = (step + 0.5) / steps
    return config.learning_rate * min(done / config.warmup, (1 - done) / (1 - config.warmup))


def arithmetic(config: RunConfig, device: torch.device) -> torch.autocast:
    """bfloat16 convolutions where the config asks for them."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bfloat16")


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock counts work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
