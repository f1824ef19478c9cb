"""ResNet9 of the DAWNBench CIFAR-10 entries, the network of the paper's Figure 9."""

from __future__ import annotations

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ResNet9(nn.Module):
    """Eight 3x3 convolutions, two of them residual pairs, and a linear classifier without bias.

    Channels are width, 2, 4 and 8 times width; at width 64 there are 6,573,120 parameters. The
    last pooling takes the maximum over what is left of the image, 4x4 pixels for CIFAR-10, so
    that smaller images pass too. `seed` makes the initial weights a function of it.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        in_channels: int = 3,
        num_classes: int = 10,
        logit_scale: float = 0.125,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.logit_scale = logit_scale
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.prep = _convolution(in_channels, width)
            self.layer1 = nn.Sequential(
                _convolution(width, 2 * width), nn.MaxPool2d(2), _Residual(2 * width)
            )
            self.layer2 = nn.Sequential(_convolution(2 * width, 4 * width), nn.MaxPool2d(2))
            self.layer3 = nn.Sequential(
                _convolution(4 * width, 8 * width), nn.MaxPool2d(2), _Residual(8 * width)
            )
            self.classifier = nn.Linear(8 * width, num_classes, bias=False)

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B d"]:
        """The last layer's input, d = 8 width."""
        return self.layer3(self.layer2(self.layer1(self.prep(images)))).amax(dim=(2, 3))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V"]:
        """Logits. Height and width are at least 8."""
        return self.classifier(self.features(images)) * self.logit_scale


class _Residual(nn.Module):
    """x + f(x), where f is two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pair = nn.Sequential(
            _convolution(channels, channels), _convolution(channels, channels)
        )

    def forward(self, images: Tensor) -> Tensor:
        return images + self.pair(images)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    parts = {"conv": convolution, "norm": nn.BatchNorm2d(outputs), "relu": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(parts))
