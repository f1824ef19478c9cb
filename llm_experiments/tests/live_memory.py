"""The memory of tensors, counted as they come and go: an oracle for what is planned."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within it, `live` are the bytes of the tensors that exist, `peak` the most that did."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        """``tensors`` are those that are there from the start."""
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        for tensor in tensors:
            self.add(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed; once, however many views of it there are."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.live -= size
