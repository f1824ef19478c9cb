"""Checkpoints beside training: often enough, of one moment, and their errors are heard."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from run_store import Attempt, Run, checkpoint_writer
from run_store.checkpoint_writer import CheckpointWriter, snapshot
from run_store.checkpoints import load_latest, save
from run_store.leases import acquire
from run_store.tests.fake_gpu import GPU, WaitedError, fake_gpu


@pytest.fixture
def mine(tmp_path: Path) -> Attempt:
    run = Run.create(tmp_path, {})
    return Attempt(run, acquire(run.folder / "attempts"))


class Simulation:
    """A run whose steps, copies and files take the seconds that they are said to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mine: Attempt) -> None:
        self.now, self.mine = 1000.0, mine
        self.go_on, self.begun = threading.Event(), threading.Event()
        monkeypatch.setattr(checkpoint_writer, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(checkpoint_writer, "keep", self.keep)

    def keep(self, *_: Any) -> None:
        self.begun.set()
        self.go_on.wait()

    def run(
        self, steps: int, step_seconds: float, copy: float, write: float
    ) -> tuple[float, float]:
        """Returns the most seconds of work that a kill would have lost, and the share of copies."""
        copying = lost = 0.0
        whole = taken = begin = self.now  # the moments that checkpoints are of

        def copy_it() -> dict[str, Any]:
            nonlocal copying, taken
            taken = self.now
            self.now += copy
            copying += copy
            return {}

        with CheckpointWriter(self.mine, 0, steps, copy_it) as writer:
            ends = None
            for step in range(1, steps + 1):
                self.now += step_seconds
                lost = max(lost, self.now - whole)
                if ends is not None and self.now >= ends:
                    self.go_on.set()
                    assert writer._thread is not None
                    writer._thread.join()
                    whole, ends = taken, None
                if writer.is_due(step):
                    self.begun.clear(), self.go_on.clear()
                    writer.take(step)
                    self.begun.wait()
                    ends = self.now + write
            self.go_on.set()
        return lost, copying / (self.now - begin)


@pytest.mark.parametrize(
    ("steps", "step_seconds", "copy", "write"),
    [
        (10_000, 0.05, 0.2, 9.0),  # openelm-270m on a GPU
        (10_000, 0.05, 0.0, 0.01),  # a tiny model
        (10_000, 0.05, 0.05, 1.2),
        (3_000, 1.0, 1.2, 4.0),  # openelm-270m on a CPU
        (300, 10.0, 0.5, 15.0),
        (10_000, 2.0, 3.0, 60.0),  # 2 % of it are 400 s
    ],
)
def test_little_is_lost_and_little_time_is_spent(
    steps: int,
    step_seconds: float,
    copy: float,
    write: float,
    mine: Attempt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost, share = Simulation(monkeypatch, mine).run(steps, step_seconds, copy, write)
    # A copy is taken, and seen to be whole, between two steps.
    assert lost <= max(60, 0.02 * steps * step_seconds) + 2 * step_seconds
    assert share <= 0.025


def test_a_checkpoint_is_of_its_moment_whatever_follows(
    mine: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Linear(3, 3)
    weight, rows, trained_on = model.weight.detach().clone(), [1], threading.Event()
    keep = checkpoint_writer.keep

    def late(*arguments: Any) -> None:
        trained_on.wait()
        keep(*arguments)

    monkeypatch.setattr(checkpoint_writer, "keep", late)

    def copy() -> dict[str, Any]:
        return snapshot(
            {"model": {**model.state_dict(), "tied": model.weight.detach()}, "rows": rows}
        )

    with CheckpointWriter(mine, 0, 9, copy) as writer:
        writer.take(4)
        with torch.no_grad():
            model.weight.zero_()
        rows.append(2)
        trained_on.set()
        writer.take(4)  # is there
    found = load_latest(mine.folder)
    assert found is not None
    assert found.step == 4
    assert torch.equal(found.state["model"]["weight"], weight)
    assert found.state["rows"] == [1]
    storages = {found.state["model"][name].data_ptr() for name in ("weight", "tied")}
    assert len(storages) == 1


@pytest.mark.parametrize("ask", [lambda writer: writer.is_due(2), CheckpointWriter.wait])
def test_a_checkpoint_that_fails_is_heard_of_once(
    ask: Callable[[CheckpointWriter], object], mine: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(mine.folder))

    monkeypatch.setattr(checkpoint_writer, "keep", full)
    with CheckpointWriter(mine, 0, 9, dict) as writer:
        writer.take(1)
        assert writer._thread is not None
        writer._thread.join()
        with pytest.raises(OSError, match="No space") as caught:
            ask(writer)
        assert caught.value.filename == str(mine.folder)
        writer.wait()


def test_what_is_being_written_ends_when_the_run_is_published(
    mine: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(mine.folder, 3, {"model": {"step": 3}})
    begun, published = threading.Event(), threading.Event()
    keep = checkpoint_writer.keep

    def slow(*arguments: Any) -> None:
        begun.set()
        published.wait()
        keep(*arguments)

    monkeypatch.setattr(checkpoint_writer, "keep", slow)
    with CheckpointWriter(mine, 3, 9, lambda: {"model": {"step": 9}}) as writer:
        writer.take(9)
        begun.wait()
        threading.Timer(0.05, published.set).start()
        writer.discard()
    assert {path.name for path in mine.folder.iterdir()} == {"lease.json"}


def test_a_gpu_is_not_waited_for() -> None:
    with fake_gpu(waiting=False):
        model = torch.nn.Linear(3, 3, device=GPU)
        with pytest.raises(WaitedError):
            model.weight.cpu()
        copied = snapshot(model.state_dict())
    assert copied["weight"].device.type == "cpu"
    assert torch.equal(copied["weight"], model.weight.values)
