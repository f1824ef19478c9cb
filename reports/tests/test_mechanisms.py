"""Verdicts on mechanisms: of studies whose s(n) is known, by margins written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.mechanisms import mechanism_view, mechanisms
from reports.page import render
from reports.reading import collect
from reports.tests.studies import make_run
from run_store import class_record, publish

COUNTS = np.array([1] * 20 + [5] * 10 + [40] * 3 + [300])
V = len(COUNTS)
# make_run's 2,000 steps at 2e-3, constant: kappa is 4 times the decay.
SETTING = {"decay_mode": "decoupled", "warmup_steps": 0, "schedule": "constant", "batch_size": 16}


def put(folder: Path, seed: int, shares: tuple[float, float], **config: Any) -> None:
    """A run at decay 0.05 whose margins have shrunk by exp(-0.2 s), and one at decay 0.

    s falls in a straight line over log n, from that of n = 1 to that of n = 300.
    """
    along = np.log(COUNTS) / math.log(300)
    s = shares[0] + (shares[1] - shares[0]) * along
    runs = ((0.0, 0.0), (0.05, 0.2)) if config.get("decay", "all") == "all" else ((0.05, 0.2),)
    for decay, kappa in runs:
        loss = np.log1p((V - 1) * np.exp(-(7 + 0.1 * seed) * np.exp(-kappa * s)))
        run = make_run(folder, weight_decay=decay, seed=seed, status="running", **SETTING | config)
        accuracy = np.ones(V)
        record = class_record(
            steps=[1], class_counts=COUNTS, labels=[f"t{k}" for k in range(V)], count=COUNTS[None],
            loss=loss[None], accuracy=accuracy[None], final_count=COUNTS, final_loss=loss,
            final_accuracy=accuracy,
        )  # fmt: skip
        publish(run, record)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds; beta2 = 0.9 raises s, the last gain has half, the inner body 0 +- much."""
    folder = tmp_path_factory.mktemp("mechanism")
    for seed in (0, 1, 2):
        noise = 0.01 * seed
        put(folder, seed, (0.7 + noise, 0.3))
        put(folder, seed, (0.9 + noise, 0.4), beta2=0.9)
        put(folder, seed, (0.35, 0.15), decay="last-norm")
        put(folder, seed, (0.35 + noise, 0.15), decay="embeddings")
        put(folder, seed, (0.2 * (seed - 1), 0.0), decay="inner")
    put(folder, 0, (0.8, 0.3), batch_size=32)
    put(folder, 0, (0.7, 0.3), steps=160, batch_size=8)  # two things at once: tests nothing
    return folder


def test_verdicts_over_paired_seeds(study: Path) -> None:
    frame = mechanisms(*collect([study]).groups).set_index("options")
    verdicts = frame["verdict"].to_dict()
    assert verdicts == {
        "--decay last-norm": "refuted",
        "--decay last-norm; --decay embeddings": "holds",
        "--decay inner": "open",
        "--batch-size 32": "refuted (one seed)",
        "--beta2 0.9": "refuted",
    }
    row = frame.loc["--beta2 0.9"]
    assert row["reference"] == pytest.approx((0.71, 0.3))
    assert row["measured"] == (pytest.approx((0.91, 0.4)),)
    assert (row["seeds"], row["weight_decay"]) == (3, 0.05)


@pytest.mark.parametrize(
    "partial", [{"optimizer": "adamw-cautious"}, {"decay_until": 0.5}, {"decay_exponent": 1.0}]
)
def test_decay_in_part_is_no_reference(tmp_path: Path, partial: dict[str, Any]) -> None:
    put(tmp_path, 0, (0.7, 0.3), **partial)
    put(tmp_path, 0, (0.9, 0.4), beta2=0.9, **partial)
    assert not len(mechanisms(*collect([tmp_path]).groups))


def test_the_page_shows_them_where_there_are_any(study: Path) -> None:
    whole = collect([study])
    view = mechanism_view(whole.groups)
    assert view is not None
    assert "0.71 to 0.30" in view.bodies[0][1][0]
    assert "Which mechanism makes rare tokens pay" in render(whole)
    assert mechanism_view(whole.groups[:1]) is None


def test_what_is_no_better_than_chance_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, 0, (0.7, 0.3))
    put(tmp_path, 0, (0.8, 60.0), beta2=0.9)  # the frequent bin's margin is gone
    (row,) = mechanisms(*collect([tmp_path]).groups).itertuples()
    assert all(math.isfinite(number) for pair in row.measured for number in pair)
