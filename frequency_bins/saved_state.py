"""Checkpoints from files that anyone may have written: read without code, restored or refused.

torch's `weights_only` builds tensors and plain containers alone. Beyond that, a file is refused
whose archive would grow when it is unpacked, or whose tensors are larger than the file, as only a
hostile one's can be. Numbers that are wrong but possible cannot be told from right ones.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from frequency_bins.input_files import open_regular


def read_state(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, on the CPU.

    Raises ValueError, naming the file, for anything that is not a dictionary of state so written.
    """
    with open(path, "rb", opener=_own) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            _check_archive(file, size)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                state = torch.load(file, map_location="cpu", weights_only=True)
            _check_tensors(state, size)
        except Exception as error:  # torch raises many kinds for a file that is not its own
            raise ValueError(f"{path}: not a checkpoint: {_reason(error)}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint: it holds a {type(state).__name__}")
    return state


def restore(parts: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Load each part (module, optimizer, ...) from its entry of a state; all are required.

    Raises ValueError, naming `path`, where one does not fit; the parts are of no use then.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                _check_optimizer(part)
        except Exception as error:
            reason = f"{name}: {_reason(error)}"
            raise ValueError(f"{path}: not a checkpoint of this run: {reason}") from None


def _own(path: str, flags: int) -> int:
    return open_regular(path, flags | os.O_NOFOLLOW)


def _check_archive(file: BinaryIO, size: int) -> None:
    """torch's archives store their records as they are."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ValueError("its records are compressed")
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records overlap")


def _check_tensors(state: Any, most_bytes: int) -> None:
    seen: set[int] = set()
    rest = [state]
    while rest:
        value = rest.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.numel() * value.element_size() > most_bytes:
                raise ValueError(f"a tensor of shape {tuple(value.shape)} in {most_bytes} bytes")
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            rest.extend(value.values() if isinstance(value, dict) else value)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """It takes a state over as it is, and would fail in the next step."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)}; expected {tuple(parameter.shape)}"
                raise ValueError(f"{name} has the shape {shapes}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
