"""Shuffled image runs: seeds come together by rank in count, and by class again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reports import figures, tables
from reports.groups import for_drawing, over_seeds
from reports.ranks import share_explained
from reports.reading import Collection, collect
from reports.table_views import difficulty_view
from run_store import Run, class_record, publish

COUNTS = np.array([4, 9, 20, 40])
SEEDS = {0: [2, 0, 3, 1], 1: [1, 3, 0, 2], 2: [0, 1, 2, 3]}  # the rank that class k has
DIFFICULTY = np.array([0.0, 0.02, 0.04, 0.06])  # what class k loses of its accuracy
AT_RANK = {0.0: np.array([0.8, 0.85, 0.9, 0.9]), 0.1: np.array([0.1, 0.5, 0.85, 0.9])}


def accuracy(decay: float, seed: int) -> np.ndarray:
    return AT_RANK[decay][SEEDS[seed]] - DIFFICULTY


def publish_shuffled(folder: Path, *, shuffled: bool = True) -> Path:
    for seed, ranks in SEEDS.items():
        for decay in AT_RANK:
            counts = COUNTS[ranks]
            config = {"model": "resnet9", "imbalance": "x", "shuffle_classes": shuffled}
            config |= {"class_counts": counts.tolist(), "weight_decay": decay, "seed": seed}
            ones = np.ones((1, 4))
            record = class_record(
                steps=[1], class_counts=counts, labels=["ant", "bee", "cat", "dog"],
                count=ones.astype(int), loss=ones, accuracy=ones, final_count=counts,
                final_loss=1 / np.sqrt(counts), final_accuracy=ones[0],
                test_count=ones.astype(int), test_accuracy=accuracy(decay, seed)[None],
            )  # fmt: skip
            publish(Run.create(folder, config), record)
    return folder


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return collect([publish_shuffled(tmp_path_factory.mktemp("shuffled") / "study")])


def test_seeds_come_together_by_rank(shuffled: Collection) -> None:
    (group,) = shuffled.groups
    assert not shuffled.unfinished
    assert group["class_count"].values.tolist() == COUNTS.tolist()
    assert group["label"].values.tolist() == ["#1", "#2", "#3", "#4"]
    band = over_seeds(group, "test_accuracy").sel(weight_decay=0.1)
    at_rank = np.array([accuracy(0.1, seed)[np.argsort(ranks)] for seed, ranks in SEEDS.items()])
    np.testing.assert_allclose(band["mean"], at_rank.mean(axis=0))
    np.testing.assert_allclose(band["std"], at_rank.std(axis=0, ddof=1))
    # The losses were made from the counts, so each rank has one.
    np.testing.assert_allclose(over_seeds(group, "loss")["std"], 0, atol=1e-12)
    falls = tables.class_falls(group)
    assert falls["rare"][0] == pytest.approx(100 * (0.7 + 0.35) / 2)  # difficulty cancels
    assert falls["frequent"][0] == pytest.approx(100 * 0.05 / 2)


def test_runs_that_were_not_shuffled_stay_apart(tmp_path: Path) -> None:
    publish_shuffled(tmp_path / "study", shuffled=False)
    apart = collect([publish_shuffled(tmp_path / "study")]).groups
    assert [len(group["run"]) for group in apart] == [2, 2, 2, 6]
    assert apart[0]["label"].values.tolist() == ["ant", "bee", "cat", "dog"]
    shuffled = [", shuffle classes" in group.attrs["name"] for group in apart]
    assert shuffled == [False, False, False, True]


def test_frequency_is_told_apart_from_difficulty(shuffled: Collection) -> None:
    frame = tables.difficulty(*shuffled.groups)
    for decay in AT_RANK:
        values = np.array([accuracy(decay, seed) for seed in SEEDS])  # by class
        # Adjusted R² in its textbook form: 1 - (SSW / (n - k)) / (SST / (n - 1)).
        within = sum(((values[:, k] - values[:, k].mean()) ** 2).sum() for k in range(4))
        expected = 1 - (within / (12 - 4)) / (((values - values.mean()) ** 2).sum() / (12 - 1))
        row = frame[frame["weight_decay"] == decay].iloc[0]
        assert row["by_class"] == pytest.approx(expected)
        assert row["by_rank"] > row["by_class"]
    assert np.isnan(share_explained(np.ones((1, 4))))
    assert np.isnan(share_explained(np.ones((3, 4))))


def test_figure_9_draws_both(shuffled: Collection) -> None:
    for groups in (shuffled.groups, [for_drawing(group) for group in shuffled.groups]):
        by_rank, by_class = figures.figure_9(*groups).axes
        ticks = [text.get_text() for text in by_rank.get_xticklabels()]
        assert ticks == ["#1 (4)", "#2 (9)", "#3 (20)", "#4 (40)"]
        assert [text.get_text() for text in by_class.get_xticklabels()] == [
            "ant", "bee", "cat", "dog",
        ]  # fmt: skip
        mean = 100 * np.mean([accuracy(0.1, seed) for seed in SEEDS], axis=0)
        np.testing.assert_allclose(by_class.lines[1].get_ydata(), mean)
    view = difficulty_view(shuffled.groups)
    assert view is not None
    assert [row[0] for row in view.bodies[0][1]] == ["0", "0.1"]
