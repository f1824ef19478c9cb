"""A run that is stopped, or fails, in a pass or at its end keeps all its steps."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_experiments.configs import DataConfig
from llm_experiments.tests.training.test_loop import CONFIG, CPU, run_of
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.training import loop
from llm_experiments.training.loop import Progress, train
from run_store import Attempt, Run, Stopped, attempt
from run_store.checkpoint_writer import CheckpointWriter
from run_store.checkpoints import load_latest

FULL = replace(CONFIG, evaluate="full")


@pytest.fixture
def whole(tmp_path: Path, data: DataConfig, corpus: PreparedCorpus) -> Run:
    run = run_of(tmp_path / "whole", FULL, data, corpus)
    with attempt(run) as mine:
        train(FULL, corpus, mine, device=CPU)
    return run


@pytest.fixture
def broken(tmp_path: Path, data: DataConfig, corpus: PreparedCorpus) -> Run:
    return run_of(tmp_path / "broken", FULL, data, corpus)


def check_equal(whole: Run, broken: Run) -> None:
    for name in ("classes.nc", "scalars.jsonl"):
        assert (broken.folder / name).exists()
    assert (broken.folder / "classes.nc").read_bytes() == (whole.folder / "classes.nc").read_bytes()
    losses = [[(row["step"], row["loss"]) for row in run.scalars()] for run in (whole, broken)]
    assert losses[0] == losses[1]
    assert not list(broken.folder.rglob("checkpoint*"))


@pytest.mark.parametrize(("which", "step"), [(1, 5), (3, 12), (4, 12)])
def test_a_pass_stops_within_a_batch_and_no_step_is_lost(
    which: int,
    step: int,
    whole: Run,
    broken: Run,
    corpus: PreparedCorpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Passes 1 to 3 are those of --evaluate full, the fourth is the final one."""
    passes: list[int] = []  # batches of each
    evaluate = loop.evaluate

    def counted(*arguments: Any) -> Any:
        *rest, look = arguments

        def count() -> None:
            passes[-1] += 1
            look()

        passes.append(0)
        return evaluate(*rest, count)

    monkeypatch.setattr(loop, "evaluate", counted)
    steps: list[int] = []

    def report(progress: Progress) -> None:
        steps.append(progress.step)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "should_stop", lambda mine: len(passes) == which and passes[-1] == 2)
        with pytest.raises(Stopped, match=f"step {step}"), attempt(broken) as mine:
            train(FULL, corpus, mine, device=CPU, report=report)
    assert passes[-1] == 2 < len(corpus.tokens) // FULL.batch_size
    with attempt(broken) as mine:
        train(FULL, corpus, mine, device=CPU, report=report)
    assert steps == list(range(1, 13))
    check_equal(whole, broken)


def test_a_disk_that_is_full_at_publication_costs_no_step(
    whole: Run, broken: Run, corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "publish", full)
        with pytest.raises(OSError, match="No space"), attempt(broken) as mine:
            train(FULL, corpus, mine, device=CPU)
    found = load_latest(mine.folder)
    assert found is not None
    assert found.step == FULL.steps
    with attempt(broken) as mine:
        train(FULL, corpus, mine, device=CPU, report=lambda progress: pytest.fail("a step"))
    check_equal(whole, broken)


def test_no_room_for_the_last_checkpoint_does_not_keep_a_run_from_its_end(
    whole: Run, broken: Run, corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("run_store.checkpoint_writer.keep", no_room)
    monkeypatch.setattr(CheckpointWriter, "is_due", lambda writer, step: False)
    with attempt(broken) as mine:
        train(FULL, corpus, mine, device=CPU)
    check_equal(whole, broken)


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("evaluate_every", [5, 100])
def test_checkpoints_are_asked_for_after_every_step(
    evaluate_every: int,
    broken: Run,
    corpus: PreparedCorpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one that is being written when a run dies is whole."""
    asked: list[int] = []

    def is_due(writer: CheckpointWriter, step: int) -> bool:
        asked.append(step)
        return step == 7

    def unplug(progress: Progress) -> None:
        if progress.step == 9:
            raise KeyboardInterrupt

    config = replace(FULL, evaluate_every=evaluate_every)
    monkeypatch.setattr(CheckpointWriter, "is_due", is_due)
    with pytest.raises(KeyboardInterrupt), attempt(broken) as mine:
        train(config, corpus, mine, device=CPU, report=unplug)
    assert asked == list(range(1, 9))
    found = load_latest(mine.folder)
    assert found is not None
    assert found.step == 7
