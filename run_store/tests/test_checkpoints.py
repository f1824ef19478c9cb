"""Checkpoints: whole and as they were written, or named and not used."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from run_store.checkpoints import load_latest, save


def test_a_checkpoint_that_was_cut_short_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 7):
        (tmp_path / f"checkpoint-{step:08d}-{'0' * 16}.pt").write_bytes(b"torn")
    assert load_latest(tmp_path) is None
    assert capsys.readouterr().err.count("cut short or changed") == 2


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            save(tmp_path, 5, {"model": model.state_dict()})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    save(tmp_path, 5, {"model": model.state_dict()})
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None
    assert torch.equal(checkpoint.state["model"]["weight"], model.weight)


def test_the_one_before_a_renamed_one_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 7, {"model": {"step": 7}})
    (tmp_path / "later").mkdir()
    save(tmp_path / "later", 5, {"model": {"step": 5}})
    (renamed,) = (tmp_path / "later").iterdir()
    renamed.rename(renamed.with_name(renamed.name.replace("00000005", "00000009")))
    found = load_latest(tmp_path, tmp_path / "later")
    assert found is not None
    assert (found.step, found.state) == (7, {"model": {"step": 7}})
    assert "00000009" in capsys.readouterr().err
