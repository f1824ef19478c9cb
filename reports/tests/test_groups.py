"""Groups of comparable runs: never mixed, and over seeds as Student says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from reports.groups import count_range, display_label, over_seeds
from reports.reading import Collection, collect
from reports.tests.studies import HOSTILE, make_run, make_study


def test_runs_of_different_settings_are_never_mixed(tmp_path: Path) -> None:
    for learning_rate in (1e-3, 2e-3):
        make_run(tmp_path, weight_decay=0.0, seed=0, learning_rate=learning_rate)
    make_run(tmp_path, weight_decay=0.0, seed=1, learning_rate=2e-3, vocab_size=200)
    groups = collect([tmp_path]).groups
    assert sorted(group.sizes["run"] for group in groups) == [1, 1, 1]
    names = [group.attrs["name"] for group in groups]
    # What most have goes without saying.
    assert names == [
        "openelm-tiny",
        "openelm-tiny, learning rate 0.001",
        "openelm-tiny, vocab size 200",
    ]


def test_a_field_that_a_config_lacks_is_not_in_its_name(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.0, seed=0)
    make_run(tmp_path, weight_decay=0.0, seed=0, beta2=0.9)
    names = [group.attrs["name"] for group in collect([tmp_path]).groups]
    assert names == ["openelm-tiny", "openelm-tiny, beta2 0.9"]


def test_over_seeds_is_student_t(collection: Collection) -> None:
    group = collection.groups[0]
    band = over_seeds(group, "token_balanced_loss").sel(weight_decay=0.3)
    first, second = group["token_balanced_loss"].values[group["weight_decay"].values == 0.3]
    assert float(band["mean"]) == pytest.approx((first + second) / 2)
    assert float(band["std"]) == pytest.approx(abs(first - second) / math.sqrt(2))
    # t(0.975, 1) = 12.7062
    assert float(band["half_width"]) == pytest.approx(12.7062047 * abs(first - second) / 2)
    assert int(band["n"]) == 2


def test_one_seed_has_no_band(tmp_path: Path) -> None:
    (group,) = collect([make_study(tmp_path, weight_decays=(0.0, 1.0), seeds=(7,))]).groups
    band = over_seeds(group, "average_loss")
    assert band["n"].values.tolist() == [1, 1]
    assert np.isnan(band["half_width"].values).all()


def test_count_ranges() -> None:
    assert count_range(1, 3) == "1–2"
    assert count_range(2187, 6561) == "2,187–6,560"
    assert count_range(4, 5) == "4"


def test_text_from_data_is_readable_and_encodable() -> None:
    shown = [display_label(label) for label in HOSTILE]
    assert shown[3] == "\\u2028\\u2029\\x00\\x1b[31m"
    assert shown[5] == "\\ud800"
    assert shown[8] == "␣the"
    "".join(shown).encode("utf-8")
