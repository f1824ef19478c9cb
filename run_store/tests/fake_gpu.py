"""A GPU without one: its tensors are computed on the CPU and say that they are on the GPU.

An operation that mixes tensors of the two raises, as on a real GPU. So does, if asked, whatever a
real GPU has to be waited for: copies to the host, and results whose values or shape the host needs.
What is not there: kernels, and autograd, in whose place `moved` gives a model gradients of zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# Operations of which a real GPU takes some of its arguments from the CPU.
_MIXING = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "lift_fresh")
_WAITED_FOR = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")


class WaitedError(RuntimeError):
    """The host would have waited for the GPU."""


class FakeGpuTensor(Tensor):
    """A tensor that says it is on the GPU; `values` are its values, on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> FakeGpuTensor:
        """Around a tensor on the CPU."""
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=GPU,
        )
        tensor.values = values
        return tensor

    def tolist(self) -> Any:
        """See `Tensor.tolist`, which wants no subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """What the mode does: it is the one place where operations are done."""
        return _compute(func, args, kwargs or {}, waiting=True)


class _FakeGpu(TorchDispatchMode):
    def __init__(self, *, waiting: bool) -> None:
        super().__init__()
        self.waiting = waiting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {}, waiting=self.waiting)


@contextlib.contextmanager
def fake_gpu(*, waiting: bool = True) -> Iterator[None]:
    """Let ``device="cuda"`` work; without `waiting` what a GPU is waited for raises WaitedError."""
    lifting = torch._C._only_lift_cpu_tensors()
    properties = SimpleNamespace(total_memory=2**40)
    with (
        sdpa_kernel(SDPBackend.MATH),  # what else there is for a GPU has no form for a CPU
        torch.backends.cudnn.flags(enabled=False),
        mock.patch.object(torch.cuda, "_lazy_init"),
        mock.patch.object(
            torch.cuda.amp.common, "amp_definitely_not_available", return_value=False
        ),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        _FakeGpu(waiting=waiting),
    ):
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(1.0, device="cuda"), too
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(lifting)


def _compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, waiting: bool) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [isinstance(tensor, FakeGpuTensor) for tensor in tensors]
    if any(on_gpu) and not all(on_gpu) and name not in _MIXING:
        shapes = [tuple(t.shape) for t, there in zip(tensors, on_gpu, strict=True) if not there]
        if any(shapes):  # a number may come from anywhere
            raise RuntimeError(f"{name} of tensors on the GPU got one on the CPU: {shapes}")
    goes = _goes_to_gpu(name, args, kwargs, any(on_gpu))
    by_mask = name.startswith("index") and any(t.dtype is torch.bool for t in tensors[1:])
    copied_later = name == "copy_" and (kwargs.get("non_blocking") or True in args[2:])
    kwargs = {option: value for option, value in kwargs.items() if option != "pin_memory"}
    comes = not goes and not copied_later and not name.startswith("empty")
    if not waiting and any(on_gpu) and (name in _WAITED_FOR or by_mask or comes):
        raise WaitedError(name)
    result = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, dict(kwargs)))
    if "out" in kwargs or (func._schema.is_mutable and isinstance(result, Tensor)):
        return kwargs.get("out", args[0])
    return tree_map(lambda x: FakeGpuTensor(x) if goes and isinstance(x, Tensor) else x, result)


def _goes_to_gpu(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], any_on_gpu: bool
) -> bool:
    if name == "copy_":
        return isinstance(args[0], FakeGpuTensor)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == GPU.type
    return any_on_gpu


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.values if isinstance(value, FakeGpuTensor) else value


@contextlib.contextmanager
def moved(model: nn.Module) -> Iterator[None]:
    """Move a model, in place; `backward` gives its parameters gradients of 0."""
    parameters: dict[int, nn.Parameter] = {}  # tied ones once
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                copy = parameters.setdefault(id(parameter), nn.Parameter(parameter.data.to(GPU)))
                module._parameters[name] = copy
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(GPU)

    def backward(loss: Tensor) -> None:
        assert isinstance(loss, FakeGpuTensor)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    with mock.patch.object(Tensor, "backward", backward):
        yield
