"""A GPU without one: tensors that know shape, type and device, and compute nothing.

An operation that mixes tensors of CPU and GPU raises, and so does what a real GPU would have to be
waited for: values that the host asks for (`item`, `bool`, `nonzero`) and copies to it. What a fake
GPU does not do: kernels, autocast, gradient scaling, and the backward pass, in whose place the
parameters of a model are given gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda")


class CopiedToHostError(RuntimeError):
    """A tensor was copied from the GPU to the CPU."""


@contextlib.contextmanager
def fake_gpu(model: nn.Module) -> Iterator[None]:
    """Move the model to a GPU that is not there; tensors made meanwhile are fake, too."""

    def backward(loss: Tensor) -> None:
        assert loss.device.type == GPU.type
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _NoCopyToHost(),
        mock.patch.object(Tensor, "backward", backward),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
    ):
        _move(model)
        yield


class _NoCopyToHost(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            source = args[-1] if func._schema.name == "aten::copy_" else args[0]
            if source.device.type == GPU.type and result.device.type == "cpu":
                raise CopiedToHostError(f"{func} of a tensor of shape {tuple(source.shape)}")
        return result


def _move(model: nn.Module) -> None:
    moved: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                copy = moved.setdefault(id(parameter), nn.Parameter(_on_gpu(parameter)))
                module._parameters[name] = copy
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _on_gpu(buffer)


def _on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device=GPU)
