"""Batches: which images, cropped, mirrored and blanked how, as a pure function of (seed, step).

The choices are drawn on the host, a few numbers an image; the pixels never leave the device.
B images of a batch, H x W pixels, C channels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from vision_appendix.configs import TrainingConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages


def training_batch(
    config: TrainingConfig, data: LabelledImages, seed: int, step: int
) -> tuple[Float[Tensor, "B C H W"], Int64[Tensor, " B"]]:
    """The augmented images and the classes of a step, on the device of the data."""
    choices = torch.from_numpy(draw_choices(config, seed, step, *data.images.shape[:2]))
    device = data.images.device
    if device.type == "cuda":
        choices = choices.pin_memory().to(device, non_blocking=True)
    return augment(config, data, choices), data.labels[choices[:, 0]]


def draw_choices(
    config: TrainingConfig, seed: int, step: int, num_images: int, size: int
) -> np.ndarray:
    """(B, 6) int64: the image, its vertical and horizontal shift, 1 if it is mirrored, and the
    upper left corner of its blank square."""
    random = np.random.default_rng((seed, step, 1))
    batch, padding = config.batch_size, config.crop_padding
    choices = np.empty((batch, 6), dtype=np.int64)
    choices[:, 0] = batch_rows(batch, seed, step, num_images)
    choices[:, 1:3] = random.integers(-padding, padding + 1, (batch, 2))
    choices[:, 3] = random.integers(0, 2, batch) if config.flip else 0
    choices[:, 4:] = random.integers(0, size - config.cutout + 1, (batch, 2))
    return choices


def check_size(config: TrainingConfig, size: int) -> None:
    """Raises ValueError if images of this size are too small for the crop or the cutout."""
    if config.crop_padding >= size or config.cutout > size:
        raise ValueError(
            f"crop_padding is {config.crop_padding} and cutout {config.cutout}; expected less "
            f"than the {size} pixels of an image"
        )


def batch_rows(batch_size: int, seed: int, step: int, num_images: int) -> np.ndarray:
    """The images of a step. Every epoch is a permutation of its own; a batch may span several."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, num_images)
    rows = [_epoch_order(seed, int(e), num_images)[places[epochs == e]] for e in np.unique(epochs)]
    return np.concatenate(rows)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, 0)).permutation(num_images)


def augment(
    config: TrainingConfig, data: LabelledImages, choices: Int64[Tensor, "B 6"]
) -> Float[Tensor, "B C H W"]:
    """Crop out of the image reflected at its border, mirror, normalise and blank a square.

    One gather from the uint8 images does the first two. The result is channels-last.
    """
    count, height, width, channels = data.images.shape
    index, down, right, mirrored, top, left = choices[:, :, None].unbind(1)
    across = torch.arange(width, device=choices.device)
    rows = _reflect(torch.arange(height, device=choices.device) + down, height)
    columns = _reflect(torch.where(mirrored > 0, width - 1 - across, across) + right, width)
    pixel = ((index * height + rows)[:, :, None] * width) + columns[:, None, :]
    pixels = data.images.view(count * height * width, channels)[pixel]
    images = (pixels - data.pixel_mean) / data.pixel_std
    if config.cutout:
        y = torch.arange(height, device=choices.device)
        blank_row = (y >= top) & (y < top + config.cutout)
        blank_column = (across >= left) & (across < left + config.cutout)
        blank = blank_row[:, :, None] & blank_column[:, None, :]
        images = images.masked_fill_(blank[..., None], 0.0)
    return images.permute(0, 3, 1, 2)


def normalise(data: LabelledImages, images: UInt8[Tensor, "B H W C"]) -> Float[Tensor, "B C H W"]:
    """Images without augmentation."""
    return ((images - data.pixel_mean) / data.pixel_std).permute(0, 3, 1, 2)


def _reflect(position: Int64[Tensor, "B n"], size: int) -> Int64[Tensor, "B n"]:
    """Mirror at the first and the last pixel, which are not repeated."""
    position = position.abs()
    return torch.where(position < size, position, 2 * (size - 1) - position)
