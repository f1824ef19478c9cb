"""Where a sweep runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine has no more memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch has no type of its own for the memory of the CPU.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def resolve_device(name: str) -> torch.device:
    """The device of a name. Raises ValueError for a GPU that is not there."""
    import torch  # which takes seconds, and what only reads or hands out runs needs none

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; this machine has no usable GPU, expected auto or cpu")
    return torch.device(name)
