"""The original CIFAR-10, where its archive lies beside the checkout: read, and learned from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from run_store import Run, attempt
from vision_appendix.configs import PAPER_COUNTS, DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages, load_images, resolve_counts
from vision_appendix.training import train

ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "cifar-10-python.tar.xz"
pytestmark = pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"{ARCHIVE} is not there")


@pytest.fixture(scope="module")
def cifar10() -> LabelledImages:
    return load_images(DataConfig(dataset="cifar10", data_dir=ARCHIVE))


def test_the_original_cifar10(cifar10: LabelledImages) -> None:
    data = cifar10
    assert data.class_counts.tolist() == [5000] * 10
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    assert data.class_names[:2] == ("airplane", "automobile")
    assert data.images.shape == (50_000, 32, 32, 3)
    # The channel means and deviations that every CIFAR-10 recipe quotes.
    mean, std = data.pixel_mean / 255, data.pixel_std / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert std.tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)
    # The first training image is a frog, whose first pixel is known.
    assert data.class_names[data.labels[0]] == "frog"
    assert data.images[0, 0, 0].tolist() == [59, 62, 63]
    counts = resolve_counts(RunConfig(imbalance="paper"), data)
    assert data.subset(counts, 0).class_counts.tolist() == list(PAPER_COUNTS)


def test_a_few_epochs_teach_what_is_frequent(cifar10: LabelledImages, tmp_path: Path) -> None:
    """Five seeds gave 34.6 to 36.8 % over all classes, 69 to 74 % over the frequent ones."""
    counts = (*[30] * 5, *[300] * 5)
    config = RunConfig(class_counts=counts, epochs=5, batch_size=32, width=4, learning_rate=0.1)
    few = slice(None, None, 10)
    data = dataclasses.replace(
        cifar10.subset(counts, config.seed),
        test_images=cifar10.test_images[few],
        test_labels=cifar10.test_labels[few],
    )
    run = Run.create(tmp_path, dataclasses.asdict(config))
    with attempt(run) as mine:
        train(config, data, mine)
    accuracy = run.classes()["test_accuracy"].values[-1]
    assert accuracy.mean() > 0.25  # 0.1 by chance
    assert accuracy[5:].mean() > 0.5
    assert accuracy[5:].min() > accuracy[:5].max()
