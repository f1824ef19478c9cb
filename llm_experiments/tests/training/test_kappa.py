"""kappa against the sum of the learning rates that the loop sets, step by step."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

from llm_experiments.configs import RunConfig, Schedule
from llm_experiments.training.kappa import kappa
from llm_experiments.training.optimization import learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (2, 0), (320, 10), (50, 49), (7, 7), (5, 20), (3, 1)]
)
def test_kappa_is_the_decay_times_the_rates(schedule: Schedule, steps: int, warmup: int) -> None:
    config = RunConfig(
        steps=steps, warmup_steps=warmup, learning_rate=2e-3, schedule=schedule, weight_decay=0.3
    )
    slow = math.fsum(learning_rate(config, step) for step in range(steps))
    assert kappa(asdict(config)) == pytest.approx(0.3 * slow, rel=1e-12, abs=1e-18)


def test_a_config_without_the_later_fields_is_that_of_their_defaults() -> None:
    config = {"weight_decay": 0.3, "learning_rate": 2e-3, "steps": 320, "warmup_steps": 10}
    full = RunConfig(steps=320, warmup_steps=10, learning_rate=2e-3, weight_decay=0.3)
    assert kappa(config) == kappa(asdict(full)) > 0


@pytest.mark.parametrize(
    "change",
    [
        {"decay_mode": "l2"},
        {"optimizer": "sign"},
        {"schedule": "steps"},
        {"steps": None},
        {"steps": "many"},
        {"schedule": ["cosine"]},
        {"steps": 10**400},
        {"learning_rate": math.inf},
        {"warmup_steps": None},
    ],
)
def test_no_kappa_is_nan(change: dict[str, Any]) -> None:
    assert math.isnan(kappa(asdict(RunConfig(weight_decay=0.3)) | change))
