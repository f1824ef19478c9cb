"""A checkpoint cut short at every tenth byte: seen for what it is, and the run ends the same."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from run_store import Run
from run_store.checkpoint_writer import CheckpointWriter
from run_store.checkpoints import load_latest
from vision_appendix.configs import DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import load_images
from vision_appendix.tests.test_training import TINY, Killed, new_run, train
from vision_appendix.training import Progress

CONFIG = replace(RunConfig(**TINY), width=1, epochs=2)


def test_a_checkpoint_cut_at_every_tenth_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CheckpointWriter, "is_due", lambda writer, step: step % 4 == 0)
    everything = load_images(DataConfig())
    data = everything.subset(CONFIG.class_counts, 0)
    whole, broken = (new_run(tmp_path / name, CONFIG) for name in ("whole", "broken"))
    train(CONFIG, data, whole)

    def kill(progress: Progress) -> None:
        if progress.step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(CONFIG, data, broken, report=kill)
    (newest,) = broken.folder.glob("attempts/*/checkpoint-*.pt")
    content = newest.read_bytes()
    found = load_latest(newest.parent)
    assert found is not None
    assert found.step == 4

    cuts = range(0, len(content), 10)
    assert len(cuts) > 1000
    for length in reversed(cuts):
        os.truncate(newest, length)
        assert load_latest(newest.parent) is None
        (said,) = capsys.readouterr().err.splitlines()
        assert said == f"ignoring {newest}: cut short or changed since it was written"

    for length in (0, cuts[1], cuts[len(cuts) // 2], cuts[-1], len(content)):
        copy = Run(tmp_path / str(length) / broken.id)
        shutil.copytree(broken.folder, copy.folder)
        (torn,) = copy.folder.glob("attempts/*/checkpoint-*.pt")
        torn.write_bytes(content[:length])
        steps: list[int] = []
        train(CONFIG, data, copy, report=lambda progress, done=steps: done.append(progress.step))
        # From the start where the only checkpoint is torn, else from where it was written.
        first = 5 if length == len(content) else 1
        assert steps == list(range(first, 9))
        assert ("ignoring" in capsys.readouterr().err) == (first == 1)
        record = copy.folder / "classes.nc"
        assert record.read_bytes() == (whole.folder / "classes.nc").read_bytes()
