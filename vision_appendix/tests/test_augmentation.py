"""Batches: a pure function of (seed, step), each image against cropping by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vision_appendix.augmentation import (
    augment,
    batch_rows,
    check_size,
    draw_choices,
    training_batch,
)
from vision_appendix.configs import TrainingConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages

SIZE = 9


def images(count: int = 5, channels: int = 3) -> LabelledImages:
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(
        random.integers(0, 256, (count, SIZE, SIZE, channels), dtype=np.uint8)
    )
    labels = torch.arange(count)
    return LabelledImages(
        images=pixels,
        labels=labels,
        test_images=pixels,
        test_labels=labels,
        pixel_mean=torch.arange(channels).float() + 100,
        pixel_std=torch.arange(channels).float() + 50,
        class_names=tuple(map(str, range(count))),
        data_hash="",
    )


@given(
    index=st.integers(0, 4),
    down=st.integers(-4, 4),
    right=st.integers(-4, 4),
    mirrored=st.booleans(),
    top=st.integers(0, SIZE - 3),
    left=st.integers(0, SIZE - 3),
    cutout=st.sampled_from([0, 3]),
)
def test_augment_against_padding_and_cutting(
    index: int, down: int, right: int, mirrored: bool, top: int, left: int, cutout: int
) -> None:
    data = images()
    config = TrainingConfig(crop_padding=4, cutout=cutout)
    choice = torch.tensor([[index, down, right, int(mirrored), top, left]])
    padded = np.pad(data.images[index].numpy(), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    expected = padded[4 + down :, 4 + right :][:SIZE, :SIZE].astype(np.float32)
    if mirrored:
        expected = expected[:, ::-1]
    expected = (expected - data.pixel_mean.numpy()) / data.pixel_std.numpy()
    if cutout:
        expected[top : top + 3, left : left + 3] = 0
    found = augment(config, data, choice)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    data, config = images(), TrainingConfig(batch_size=7, crop_padding=2, cutout=3)
    first, labels = training_batch(config, data, 1, 2)
    torch.rand(3)
    np.random.default_rng().random()
    again, _ = training_batch(config, data, 1, 2)
    assert torch.equal(first, again)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == batch_rows(7, 1, 2, 5).tolist()
    choices = draw_choices(config, 1, 2, 5, SIZE)
    for seed, step in ((1, 3), (2, 2)):
        other = draw_choices(config, seed, step, 5, SIZE)
        for column in range(6):  # mirroring is a coin: seven of them may fall alike
            assert column == 3 or (choices[:, column] != other[:, column]).any()


@given(num_images=st.integers(1, 20), batch_size=st.integers(1, 45), seed=st.integers(0, 3))
def test_every_epoch_shows_every_image_once(num_images: int, batch_size: int, seed: int) -> None:
    steps = 4 * num_images // batch_size + 1
    rows = np.concatenate([batch_rows(batch_size, seed, s, num_images) for s in range(steps)])
    for start in range(0, len(rows) - num_images + 1, num_images):
        assert sorted(rows[start : start + num_images]) == list(range(num_images))


def test_choices_cover_their_range() -> None:
    config = TrainingConfig(batch_size=2000, crop_padding=2, cutout=3)
    choices = draw_choices(config, 0, 0, 10, SIZE)
    assert set(np.unique(choices[:, 1:3])) == {-2, -1, 0, 1, 2}
    assert set(np.unique(choices[:, 3])) == {0, 1}
    assert set(np.unique(choices[:, 4:])) == set(range(SIZE - 2))
    plain = draw_choices(TrainingConfig(crop_padding=0, flip=False, cutout=0), 0, 0, 10, SIZE)
    assert not plain[:, 1:4].any()


@pytest.mark.parametrize("changes", [{"crop_padding": SIZE}, {"cutout": SIZE + 1}])
def test_images_too_small_are_named(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"the {SIZE} pixels"):
        check_size(TrainingConfig(**changes), SIZE)
