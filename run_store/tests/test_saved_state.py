"""Checkpoints from hostile hands."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from run_store.saved_state import read_state, restore


class Code:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def trained(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    parts = {"model": model, "optimizer": optimizer(model.parameters(), lr=0.1, **more)}
    model(torch.ones(1, 3)).sum().backward()
    parts["optimizer"].step()
    return parts


def states(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in parts.items()}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_state_comes_back(tmp_path: Path, optimizer: type[torch.optim.Optimizer]) -> None:
    parts = trained(optimizer)
    torch.save(states(parts) | {"step": 3}, tmp_path / "state.pt")
    state = read_state(tmp_path / "state.pt")
    assert state["step"] == 3
    others = trained(optimizer)
    nn.init.zeros_(others["model"].weight)
    restore(others, state, tmp_path / "state.pt")
    assert torch.equal(others["model"].weight, parts["model"].weight)


def _code(folder: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": Code(folder / "touched")}, buffer)
    return buffer.getvalue()


def _bare_pickle(folder: Path) -> bytes:
    return pickle.dumps(Code(folder / "touched"))


def _bomb(_: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": torch.zeros(2**20)}, buffer)
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(buffer) as plain,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for info in plain.infolist():
            archive.writestr(info.filename, plain.read(info))
    return packed.getvalue()


def _expanded(_: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": torch.zeros(1).expand(2**40)}, buffer)
    return buffer.getvalue()


def _long_name(_: Path) -> bytes:
    """What takes torch minutes to complain of."""
    buffer = io.BytesIO()
    torch.save({"x" * 100_000: 1}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_code, "UnpicklingError"),
        (_bare_pickle, "BadZipFile"),
        (_bomb, "records are compressed"),
        (_expanded, "a tensor of shape"),
        (_long_name, "a string of 100000 characters"),
        (lambda _: b"", "BadZipFile"),
    ],
)
def test_hostile_files_are_named(
    make: Callable[[Path], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(make(tmp_path))
    with pytest.raises(ValueError, match=rf"state\.pt: not a checkpoint: .*{message}"):
        read_state(path)
    assert not (tmp_path / "touched").exists()


def test_a_link_or_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "state.pt")
    (tmp_path / "link.pt").symlink_to("state.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("link.pt", "pipe.pt"):
        with pytest.raises(ValueError, match=name):
            read_state(tmp_path / name)


def _without_moments(state: dict[str, Any]) -> None:
    del state["optimizer"]["state"][0]["exp_avg"]


def _another_shape(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)


def _another_setting(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"][0]["weight_decay"] = 5.0


def _capturable(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"][0]["capturable"] = True


def _a_rate_in_words(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"][0]["lr"] = "fast"


def _another_model(state: dict[str, Any]) -> None:
    state["model"] = nn.Linear(4, 2).state_dict()


@pytest.mark.parametrize(
    "damage",
    [
        _without_moments, _another_shape, _another_setting, _capturable, _a_rate_in_words,
        _another_model, lambda state: state.pop("model"),
        lambda state: state.update(optimizer=[1]),
    ],
)  # fmt: skip
def test_state_of_another_run_is_refused(
    damage: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    state = states(trained())
    damage(state)
    with pytest.raises(ValueError, match=r"state\.pt: not a checkpoint of this run: (model|opt)"):
        restore(trained(), state, tmp_path / "state.pt")
