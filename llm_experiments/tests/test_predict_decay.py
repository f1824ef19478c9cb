"""predict-decay: bins' losses against the margin law written out, and studies that do not do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frequency_bins import seed_band
from llm_experiments.__main__ import main
from llm_experiments.predict_decay import predict_decay
from run_store import Run, class_record, publish

COUNTS = np.array([1, 1, 2, 3, 9, 12, 40, 0])
RATE, STEPS = 2e-3, 50  # constant: kappa is a tenth of the decay


def put(folder: Path, decay: float, seed: int, **changes: Any) -> None:
    """A finished run whose margins are 5 exp(-kappa s), s falling with the count."""
    loss = np.array([slow_loss(n, decay, seed) if n else np.nan for n in COUNTS])
    config = {
        "model": "openelm-tiny", "weight_decay": decay, "seed": seed, "learning_rate": RATE,
        "steps": STEPS, "warmup_steps": 0, "schedule": "constant", "decay_mode": "decoupled",
    }  # fmt: skip
    run = Run.create(folder, config | changes)
    whole = np.where(COUNTS > 0, 1.0, np.nan)
    publish(
        run,
        class_record(
            steps=[STEPS], class_counts=COUNTS, labels=list("abcdefgh"), count=COUNTS[None],
            loss=loss[None], accuracy=whole[None], final_count=COUNTS, final_loss=loss,
            final_accuracy=whole,
        ),
    )  # fmt: skip


def slow_loss(count: int, decay: float, seed: int) -> float:
    margin = (5 + seed) * math.exp(-0.1 * decay / (1 + math.log(count)))
    return math.log1p(7 * math.exp(-margin))


def slow_bin(decay: float, seed: int, members: list[int]) -> float:
    tokens = sum(COUNTS[k] for k in members)
    return sum(COUNTS[k] * slow_loss(COUNTS[k], decay, seed) for k in members) / tokens


def test_bins_are_predicted_by_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        for decay in (0.0, 1.0, 3.0):
            put(tmp_path, decay, seed)
    put(tmp_path, 0.5, 2)  # without a partner
    (found,), reasons = predict_decay(tmp_path, [0.0, 2.0], second_order=False)
    assert not reasons
    assert (found.setting, found.seeds, found.weight_decay) == ("openelm-tiny", (0, 1), 1.0)
    assert found.kappa == pytest.approx(0.1)
    for place, members in enumerate(([0, 1], [2, 3], [], [4, 5], [], [6])):
        if not members:
            assert np.isnan(found.predicted[2.0].mean[place])
            continue
        seeds = []
        for seed in (0, 1):
            before, after = (
                math.log(7 / math.expm1(slow_bin(decay, seed, members))) for decay in (0.0, 1.0)
            )
            seeds.append(math.log1p(7 * math.exp(-before * (after / before) ** 2)))
        expected = seed_band(np.array(seeds))
        assert found.predicted[2.0].mean[place] == pytest.approx(expected.mean)
        assert found.predicted[2.0].half_width[place] == pytest.approx(expected.half_width)
        floor = np.mean([slow_bin(0.0, seed, members) for seed in (0, 1)])
        assert found.predicted[0.0].mean[place] == pytest.approx(floor)


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for decay in (0.0, 1.0):
        put(tmp_path, decay, 0)
    put(tmp_path, 1.0, 0, loss_weight_exponent=0.5)
    assert main(["predict-decay", str(tmp_path), "--weight-decay", "2", "3", "--first-order"]) == 0
    out = capsys.readouterr().out
    assert out.split("\n")[0].strip() == "openelm-tiny"
    assert "first order from decay 1, kappa 0.1; seed 0." in out
    assert "not predicted: openelm-tiny, loss weight exponent 0.5: no run at decay 0" in out
    (row,) = (line.split() for line in out.splitlines() if line.split()[:1] == ["32-63"])
    assert row[1] == "1"
    # One class: the margins of the record itself.
    assert row[2:] == [f"{slow_loss(40, decay, 0):.4f}" for decay in (0, 1, 2, 3)]


def _no_run_at_decay_0(folder: Path) -> None:
    put(folder, 1.0, 0)


def _no_decay(folder: Path) -> None:
    put(folder, 0.0, 0)


def _other_seeds(folder: Path) -> None:
    put(folder, 0.0, 0)
    put(folder, 1.0, 1)


def _l2(folder: Path) -> None:
    for decay in (0.0, 1.0):
        put(folder, decay, 0, decay_mode="l2")


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _lawful(folder: Path) -> None:
    for decay in (0.0, 1.0):
        put(folder, decay, 0)


@pytest.mark.parametrize(
    ("make", "decays", "expected"),
    [
        (_no_run_at_decay_0, ["2"], "openelm-tiny: no run at decay 0; expected one"),
        (_no_decay, ["2"], "openelm-tiny: no run with weight decay; expected one"),
        (_other_seeds, ["2"], "no seed has a run at decay 0 and one above"),
        (_l2, ["2"], "its decay is not AdamW's decoupled one"),
        (_nothing, ["2"], "holds no finished run"),
        (lambda folder: None, ["2"], "is not a study"),
        (_lawful, ["-1"], "weight_decay is -1.0; expected a finite number of at least 0"),
        (_lawful, ["nan"], "weight_decay is nan"),
        (_lawful, [], "no weight decay is given"),
    ],
)
def test_one_line_and_exit_code_2(
    make: Callable[[Path], None],
    decays: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "study")
    assert main(["predict-decay", str(tmp_path / "study"), "--weight-decay", *decays]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert expected in said.err
    assert said.err.count("\n") == 1
    assert not said.out
