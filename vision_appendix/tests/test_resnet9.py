"""The network: its size, its shapes, and its layers against a plain reimplementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, max_pool2d, relu

from vision_appendix.resnet9 import ResNet9


def test_the_papers_network_has_6573120_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in ResNet9().parameters()) == 6_573_120


def test_forward_against_the_layers_written_out() -> None:
    model = ResNet9(width=4, seed=0)
    for name, parameter in model.named_parameters():  # else every batch norm is the identity
        if "norm" in name:
            torch.nn.init.uniform_(
                parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name))
            )
    weights = [p for p in model.parameters() if p.ndim == 4]
    scales = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
    shifts = [p for n, p in model.named_parameters() if n.endswith("norm.bias")]

    def convolve(x: Tensor, i: int) -> Tensor:
        x = conv2d(x, weights[i], padding=1)
        return relu(batch_norm(x, None, None, scales[i], shifts[i], training=True))

    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = convolve(images, 0)
    x = max_pool2d(convolve(x, 1), 2)
    x = x + convolve(convolve(x, 2), 3)
    x = max_pool2d(convolve(x, 4), 2)
    x = max_pool2d(convolve(x, 5), 2)
    x = x + convolve(convolve(x, 6), 7)
    x = max_pool2d(x, 4).flatten(1)
    assert x.shape == (3, 32)
    torch.testing.assert_close(model.features(images), x)
    logits = x @ model.classifier.weight.T * 0.125
    torch.testing.assert_close(model(images), logits)


def test_the_seed_decides_the_weights_and_nothing_else() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, same, other = (ResNet9(width=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_smaller_images_pass(size: int) -> None:
    model = ResNet9(width=2, in_channels=1, num_classes=7)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)
