"""A checkpoint cut short at every tenth byte: seen for what it is, and the run ends the same."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llm_experiments.configs import DataConfig, RunConfig
from llm_experiments.models import presets
from llm_experiments.tests.training.test_loop import CPU
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training.loop import Progress, train
from run_store import Run, attempt
from run_store.checkpoint_writer import CheckpointWriter
from run_store.checkpoints import load_latest

CONFIG = RunConfig(
    model="qwen2-tiny", steps=8, batch_size=4, evaluate_every=4, learning_rate=3e-3, seed=1
)


class Killed(BaseException):
    """Ends a run as a signal would."""


@pytest.fixture(autouse=True)
def smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose checkpoint has few enough bytes to be cut at every tenth, written when due."""
    monkeypatch.setattr(CheckpointWriter, "is_due", lambda writer, step: step % 4 == 0)
    monkeypatch.setitem(presets._QWEN2, "qwen2-tiny", (8, 1, 1, 1, 8, 0.3))


def trained(run: Run, corpus: PreparedCorpus, killed_after: int = CONFIG.steps) -> list[int]:
    """The steps that one attempt at a run does."""
    steps: list[int] = []

    def report(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step > killed_after:
            raise Killed

    with attempt(run) as mine:
        train(CONFIG, corpus, mine, device=CPU, report=report)
    return steps


def new_run(folder: Path, data: DataConfig, corpus: PreparedCorpus) -> Run:
    return Run.create(folder, CONFIG.resolved(data, corpus.data_hash))


def test_a_checkpoint_cut_at_every_tenth_byte(
    data: DataConfig, corpus: PreparedCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = (new_run(tmp_path / name, data, corpus) for name in ("whole", "broken"))
    assert trained(whole, corpus) == list(range(1, 9))
    with pytest.raises(Killed):
        trained(broken, corpus, killed_after=4)
    (newest,) = broken.folder.glob("attempts/*/checkpoint-*.pt")
    content = newest.read_bytes()
    assert load_latest(newest.parent) is not None

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
        # From the start where the only checkpoint is torn, else from where it was written.
        first = 5 if length == len(content) else 1
        assert trained(copy, corpus) == list(range(first, 9))
        assert ("cut short" in capsys.readouterr().err) == (first == 1)
        record = copy.folder / "classes.nc"
        assert record.read_bytes() == (whole.folder / "classes.nc").read_bytes()
        assert [row["step"] for row in copy.scalars()] == [4, 8]
