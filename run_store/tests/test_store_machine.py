"""The run store against a dictionary, while any of its writes may fail."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from run_store import Run, attempt, read_study, run_id
from run_store.attempts import Stopped
from run_store.tests.test_runs import record

SEEDS = st.integers(0, 2)
# 0: no write fails; k: the k-th does, and every write after it too if the disk stays full.
FAULTS = st.tuples(st.integers(0, 12), st.booleans())


@contextlib.contextmanager
def failing(fault: tuple[int, bool]) -> Iterator[None]:
    """The k-th of the calls that change the disk raises ENOSPC."""
    at, stays_full = fault
    calls = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def failable(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if at and (calls == at or (stays_full and calls > at)):
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments, **options)

        return failable

    with contextlib.ExitStack() as stack:
        for name in ("rename", "replace", "fsync", "mkdir", "pwrite"):
            stack.enter_context(mock.patch.object(os, name, wrapped(getattr(os, name))))
        yield


class Store(RuleBasedStateMachine):
    """`runs` is the model: of each run its scalars, and the seed of its record if published."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="store-"))
        self.runs: dict[int, dict[str, Any]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def run(self, seed: int) -> Run:
        return Run(self.folder / run_id({"seed": seed}))

    @rule(seed=SEEDS, fault=FAULTS)
    def create(self, seed: int, fault: tuple[int, bool]) -> None:
        with contextlib.suppress(OSError), failing(fault):
            Run.create(self.folder, {"seed": seed})
        if self.run(seed).folder.exists():
            self.runs.setdefault(seed, {"steps": [], "record": None})

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), more=st.integers(1, 3), fault=FAULTS)
    def train(self, data: st.DataObject, more: int, fault: tuple[int, bool]) -> None:
        """An attempt goes on from a step, adds scalars and stops."""
        seed = data.draw(st.sampled_from(sorted(self.runs)))
        model, run = self.runs[seed], self.run(seed)
        if model["record"] is not None:
            return
        step = data.draw(st.sampled_from([0, *model["steps"]]))
        kept = [s for s in model["steps"] if s <= step]
        added: list[int] = []
        with contextlib.suppress(OSError, Stopped), failing(fault), attempt(run) as new:
            earlier = [f for f in new.folders()[1:] if (f / "scalars.jsonl").exists()]
            new.resume(step, earlier[0] if kept else None)
            for next_step in range(step + 1, step + 1 + more):
                new.append_scalars({"step": next_step})
                added.append(next_step)
            raise Stopped
        steps = [row["step"] for row in run.scalars()]
        # Scalars are what the attempt came to, or those before it if it came to none.
        assert steps in (kept + added, model["steps"]) or (not added and steps == kept)
        model["steps"] = steps

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), fault=FAULTS, number=st.integers(1, 5))
    def publish(self, data: st.DataObject, fault: tuple[int, bool], number: int) -> None:
        seed = data.draw(st.sampled_from(sorted(self.runs)))
        model, run = self.runs[seed], self.run(seed)
        if model["record"] is not None:
            return
        published = False
        with contextlib.suppress(OSError), failing(fault), attempt(run) as new:
            new.append_scalars({"step": 1})
            new.publish(record(4, number))
            published = True
        if not published:
            with contextlib.suppress(OSError, Stopped), attempt(run):  # finishes what was begun
                raise Stopped
        assert run.status == "finished" or not published
        if run.status == "finished":
            model["record"] = number
        model["steps"] = [row["step"] for row in run.scalars()]

    @invariant()
    def what_is_there_is_what_was_written(self) -> None:
        study = read_study(self.folder)
        assert study.problems == ()
        assert {r.id for r in (*study.runs, *study.unfinished)} == {
            run_id({"seed": seed}) for seed in self.runs
        }
        for seed, model in self.runs.items():
            run = self.run(seed)
            assert run.config == {"seed": seed}
            assert [row["step"] for row in run.scalars()] == model["steps"]
            assert (run.status == "finished") == (model["record"] is not None)
            if model["record"] is not None:
                expected = record(4, model["record"])
                np.testing.assert_array_equal(run.classes()["loss"], expected["loss"])
            leftovers = [p.name for p in run.folder.iterdir() if p.name.endswith(".partial")]
            assert leftovers == []


TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=10,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
