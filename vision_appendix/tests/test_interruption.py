"""A run that is stopped in a pass, or fails at its end, keeps all its steps."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from run_store import Attempt, Stopped
from vision_appendix import last_layer, training
from vision_appendix.configs import DataConfig, RunConfig
from vision_appendix.imbalanced_cifar10 import LabelledImages, load_images
from vision_appendix.tests.test_training import TINY, new_run, train

CONFIG = RunConfig(**TINY)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> LabelledImages:
    for module in (training, last_layer):
        monkeypatch.setattr(module, "EVALUATION_BATCH", 10)
    return load_images(DataConfig()).subset(CONFIG.class_counts, 0)


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("which", "step"), [(1, 4), (3, 12), (4, 12), (5, 12)])
def test_a_pass_stops_within_a_batch_and_no_step_is_lost(
    which: int,
    step: int,
    digits: LabelledImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Passes 1 to 3 are over the test images, 4 is the final one, 5 that of the last layer."""
    whole, broken = (new_run(tmp_path / name, CONFIG) for name in ("whole", "broken"))
    train(CONFIG, digits, whole)
    passes: list[int] = []  # batches of each

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            *rest, look = arguments

            def count() -> None:
                passes[-1] += 1
                look()

            passes.append(0)
            return function(*rest, count)

        return counted

    for name in ("evaluate", "last_layer"):
        monkeypatch.setattr(training, name, counting(getattr(training, name)))
    steps: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "should_stop", lambda mine: len(passes) == which and passes[-1] == 2)
        with pytest.raises(Stopped, match=f"step {step}"):
            train(CONFIG, digits, broken, report=lambda progress: steps.append(progress.step))
    assert passes[-1] == 2
    train(CONFIG, digits, broken, report=lambda progress: steps.append(progress.step))
    assert steps == list(range(1, 13))
    for name in ("classes.nc", "last_layer.safetensors"):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert [row["step"] for row in broken.scalars()] == [4, 8, 12]


def test_a_disk_that_is_full_at_publication_costs_no_step(
    digits: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "publish", no_room)
        with pytest.raises(OSError, match="No space"):
            train(CONFIG, digits, run)
    train(CONFIG, digits, run, report=lambda progress: pytest.fail("a step"))
    assert run.status == "finished"
