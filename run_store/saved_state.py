"""Checkpoints from files that anyone may have written: read without code, restored or refused.

torch's `weights_only` builds tensors and plain containers alone. Beyond that, a file is refused
whose archive would grow when it is unpacked, or whose tensors are larger than the file, as only a
hostile one's can be. Numbers that are wrong but possible cannot be told from right ones.
"""

from __future__ import annotations

import os
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from run_store.input_files import open_regular

_LONGEST_STRING = 1000


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
            if isinstance(part, torch.optim.Optimizer):
                _restore_optimizer(part, state[name])
            else:
                part.load_state_dict(state[name])
        except Exception as error:
            reason = f"{name}: {_reason(error)}"
            raise ValueError(f"{path}: not a checkpoint of this run: {reason}") from None


def _own(path: str, flags: int) -> int:
    return open_regular(path, flags | os.O_NOFOLLOW)


def _check_archive(file: BinaryIO, size: int) -> None:
    """torch's archives store their records as they are, and their pickle holds short strings."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        pickles = [record for record in records if record.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > size:
            raise ValueError(f"it holds {len(pickles)} pickles; expected one")
        pickled = archive.read(pickles[0])
    # torch looks for words in its own complaint, at a cost quadratic in the string complained of.
    for _, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str | bytes | bytearray) and len(argument) > _LONGEST_STRING:
            raise ValueError(f"a string of {len(argument)} characters")
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


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """An optimizer takes any state over as it is, and would fail in the next step."""
    settings = _settings(optimizer)
    optimizer.load_state_dict(state)
    rates = [group["lr"] for group in optimizer.param_groups]
    if _settings(optimizer) != settings or not all(type(rate) is float for rate in rates):
        raise ValueError("other settings than the run's")
    held: dict[Tensor, set[str]] = {}
    for part in getattr(optimizer, "parts", (optimizer,)):
        names = {"step", "exp_avg", "exp_avg_sq"}
        if isinstance(part, torch.optim.SGD | torch.optim.Muon):
            names = {"momentum_buffer"}
        held |= {p: names for group in part.param_groups for p in group["params"]}
    for parameter, values in optimizer.state.items():
        expected = held.get(parameter, set())
        if set(values) != expected:
            raise ValueError(f"it holds {sorted(map(str, values))}; expected {sorted(expected)}")
        for name, value in values.items():
            like = torch.zeros(()) if name == "step" else parameter
            if not isinstance(value, Tensor) or (value.shape, value.dtype) != (
                like.shape,
                like.dtype,
            ):
                raise ValueError(f"{name} is no tensor like its parameter")


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer was told, but for the learning rate, which is set in every step."""
    untold = ("params", "lr")
    return [
        {name: value for name, value in group.items() if name not in untold}
        for group in optimizer.param_groups
    ]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
