"""The geometry of a trained network's last layer: measured, and read from beside its record.

V classes, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from run_store.input_files import read_file
from vision_appendix.augmentation import normalise
from vision_appendix.imbalanced_cifar10 import LabelledImages
from vision_appendix.resnet9 import ResNet9

LAST_LAYER = "last_layer.safetensors"
EVALUATION_BATCH = 1000
_MOST_BYTES = 2**26


@torch.no_grad()
def last_layer(
    model: ResNet9, data: LabelledImages, look: Callable[[], object] = lambda: None
) -> dict[str, Tensor]:
    """The last layer on the training images, without augmentation.

    `classifier` (V, d) as it multiplies features, the logits' scale included; `class_means`
    (V, d) of the features; `within_class_covariance` (d, d), the mean over images of the outer
    product of feature minus class mean; `within_class_variance` (V,), the mean squared distance
    to the class mean. float32, computed in float64. `look` is called after every batch, and may
    raise.
    """
    model.eval()
    parts = []
    for images in data.images.split(EVALUATION_BATCH):
        parts.append(model.features(normalise(data, images)).double())
        look()
    features = torch.cat(parts)
    model.train()
    labels = data.labels
    counts = data.class_counts.to(labels.device).double()
    sums = features.new_zeros(len(counts), features.shape[1]).index_add_(0, labels, features)
    means = sums / counts[:, None]
    centred = features - means[labels]
    distances = torch.zeros_like(counts).index_add_(0, labels, centred.square().sum(dim=1))
    layer = {
        "classifier": model.classifier.weight * model.logit_scale,
        "class_means": means,
        "within_class_covariance": centred.T @ centred / len(features),
        "within_class_variance": distances / counts,
    }
    return {name: tensor.float().cpu().contiguous() for name, tensor in layer.items()}


def read_last_layer(folder: Path, num_classes: int) -> dict[str, Tensor] | None:
    """What `last_layer` left in a run's folder, in float64; None where there is none.

    Raises ValueError, naming the file, if it is not whole or not of `num_classes` classes.
    """
    path = folder / LAST_LAYER
    try:
        content = read_file(path, most_bytes=_MOST_BYTES, follow_links=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        layer = {name: value.double() for name, value in safetensors.torch.load(content).items()}
    except Exception as error:  # of many kinds, by what is wrong with the header
        raise ValueError(f"{path}: not safetensors: {error}") from None
    for name, ndim in (("classifier", 2), ("class_means", 2), ("within_class_variance", 1)):
        value = layer.get(name)
        if value is None or value.ndim != ndim or len(value) != num_classes:
            found = "none" if value is None else f"shape {tuple(value.shape)}"
            raise ValueError(f"{path}: {name} has {found}; expected {num_classes} classes")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: {name} is not finite")
    if layer["classifier"].shape != layer["class_means"].shape:
        raise ValueError(f"{path}: classifier and class_means have different widths")
    return layer
