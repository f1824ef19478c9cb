"""Settings at one average loss, against numpy's interpolation of the runs; the page's section."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from frequency_bins import paired_band, seed_band
from llm_experiments.downstream.results import Downstream, read_downstream, write_downstream
from reports import figures
from reports.alternative_views import section
from reports.alternatives import alternatives, compared
from reports.page import drawings, render
from reports.reading import Collection, collect, joined
from reports.tasks import rises
from reports.tests.studies import make_run
from run_store import read_study
from ufm.repair import weak_decay_losses

SETTINGS: Sequence[tuple[dict[str, Any], Sequence[tuple[float, float]]]] = (
    # What is changed, then weight decays and the n_c that make their losses.
    ({}, [(0.0, 0.02), (0.3, 0.2), (1.0, 2.0)]),
    ({"dropout": 0.1}, [(0.0, 0.1)]),
    ({"dropout": 0.3}, [(0.0, 0.5)]),
    ({"optimizer": "muon", "learning_rate": 1e-3}, [(0.0, 0.03), (0.3, 0.4), (1.0, 3.0)]),
    ({"decay_exponent": 1.0}, [(0.3, 0.25), (1.0, 0.9)]),
    ({"loss_weight_exponent": 0.5}, [(0.0, 1.0), (1.0, 5.0)]),
    ({"norm": "layernorm"}, [(1.0, 2.0)]),  # a point is no curve
)


def make(folder: Path, seeds: Sequence[int] = (0, 1, 2), **more: Any) -> Path:
    for changed, points in SETTINGS:
        for decay, critical_count in points:
            for seed in seeds:
                cell = {"weight_decay": decay, "seed": seed, "critical_count": critical_count}
                make_run(folder, **(cell | changed | more))
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("runs") / "s")


@pytest.fixture(scope="module")
def collection(study: Path) -> Collection:
    return collect([study])


def values(groups: Sequence[xr.Dataset], name: str, decay: float, **changed: Any) -> np.ndarray:
    """(S,) of the runs at a decay whose config has these fields and no other of a setting."""
    fields = {field for others, _ in SETTINGS for field in others} - {"learning_rate"}
    for group in groups:
        config = group.attrs["config"]
        if {f: config[f] for f in fields if f in config} == changed:
            at = group["weight_decay"].values == decay
            order = np.argsort(group["seed"].values[at])
            return np.asarray(group[name].values[at][order])
    raise AssertionError(changed)


def test_settings_are_read_at_the_references_average(collection: Collection) -> None:
    groups = collection.groups
    (comparison,) = compared(groups)
    names = [curve.name for curve in comparison.curves]
    assert names == ["dropout", "muon", "decay by count^1", "loss × count^−0.5"]
    assert comparison.decay == 0.3  # which three curves reach; at 1 it would be two
    rows = alternatives(*groups).set_index("setting")
    at = values(groups, "average_loss", 0.3)
    assert rows.loc["weight decay", "balanced_difference"] == 0
    curves: dict[str, list[tuple[float, dict[str, Any]]]] = {
        "dropout": [(0.0, {}), (0.0, {"dropout": 0.1}), (0.0, {"dropout": 0.3})],
        "muon": [(decay, {"optimizer": "muon"}) for decay in (0.0, 0.3, 1.0)],
        "decay by count^1": [(0.0, {}), *((d, {"decay_exponent": 1.0}) for d in (0.3, 1.0))],
    }
    for name, points in curves.items():
        x, y = (
            np.stack([values(groups, n, decay, **changed) for decay, changed in points])
            for n in ("average_loss", "token_balanced_loss")
        )
        read = np.array([np.interp(at[s], x[:, s], y[:, s]) for s in range(3)])
        band = seed_band(read - values(groups, "token_balanced_loss", 0.3))
        row = rows.loc[name]
        assert (row["n"], row["balanced"]) == (3, pytest.approx(read.mean()))
        assert row["balanced_difference"] == pytest.approx(float(band.mean), abs=1e-12)
        assert row["balanced_half_width"] == pytest.approx(float(band.half_width), abs=1e-12)
        assert row["note"] == ""


def test_what_is_not_reached_is_named(collection: Collection) -> None:
    row = alternatives(*collection.groups).set_index("setting").loc["loss × count^−0.5"]
    assert row["n"] == 0
    assert "do not reach" in row["note"]
    assert math.isnan(row["balanced"])
    found = section(collection.groups, {})
    assert found is not None
    said = " ".join(found.sentences)
    assert "that average is not reached with loss × count^−0.5" in said
    (table, *_) = found.tables
    shown = {row[0]: row for _, rows in table.bodies for row in rows}
    assert "do not reach" in shown["loss × count^−0.5"][2]


def test_the_same_decay_and_what_the_theory_predicts(collection: Collection) -> None:
    groups = collection.groups
    rows = alternatives(*groups).set_index("setting")
    change = values(groups, "token_balanced_loss", 0.3, decay_exponent=1.0)
    change = change - values(groups, "token_balanced_loss", 0.3)
    row = rows.loc["decay by count^1"]
    assert row["balanced_change"] == pytest.approx(change.mean())
    half = float(seed_band(change).half_width)
    assert row["balanced_change_half"] == pytest.approx(half)
    found = section(groups, {})
    assert found is not None
    (said,) = [s for s in found.sentences if s.startswith("At weight decay 0.3 itself")]
    assert f"by +{change.mean():.3f} ± {half:.3f}, where the theory predicted" in said
    added = values(groups, "token_balanced_loss", 0.3) - values(groups, "token_balanced_loss", 0.0)
    counts = groups[0]["class_count"].values
    left = weak_decay_losses(counts, row_exponent=1.0, feature_sharing=1.0)[1]
    assert row["predicted_change"] == pytest.approx((left - 1) * added.mean())
    assert math.isnan(rows.loc["muon", "predicted_change"])
    assert math.isnan(rows.loc["loss × count^−0.5", "balanced_change"])  # it has no run there


@pytest.mark.parametrize(
    ("changed", "decays"),
    [({"loss_weight_exponent": 0.5}, (1.0,)), ({"model": "qwen2-tiny"}, (0.0, 1.0))],
)
def test_nothing_to_compare_is_no_section(
    changed: dict[str, Any], decays: Sequence[float], tmp_path: Path
) -> None:
    """A point without a sweep; another model."""
    for decay in (0.0, 1.0):
        make_run(tmp_path / "s", weight_decay=decay, seed=0)
    for decay in decays:
        make_run(tmp_path / "s", **({"weight_decay": decay, "seed": 0} | changed))
    collection = collect([tmp_path / "s"])
    assert section(collection.groups, {}) is None
    assert "what helps?" not in render(collection)


def test_a_mixture_of_experts_is_beside_its_dense_model(tmp_path: Path) -> None:
    for model in ("qwen2-tiny", "qwen2-moe-tiny"):
        for decay in (0.0, 1.0):
            make_run(tmp_path / "s", weight_decay=decay, seed=0, model=model)
    (comparison,) = compared(collect([tmp_path / "s"]).groups)
    assert comparison.group.attrs["config"]["model"] == "qwen2-tiny"
    assert [curve.name for curve in comparison.curves] == ["qwen2-moe-tiny"]


def test_two_studies_on_one_page_are_compared_each_by_itself(collection: Collection) -> None:
    other = Collection(**(vars(collection) | {"studies": ("other",)}))
    found = compared(joined(collection, other).groups)
    assert [c.name.split(":")[0] for c in found] == ["s", "other"]
    (alone,) = compared(collection.groups)
    assert all(len(c.curves) == len(alone.curves) for c in found)


def test_a_run_of_another_seed_alone_is_no_point(tmp_path: Path) -> None:
    for decay in (0.0, 1.0):
        make_run(tmp_path / "s", weight_decay=decay, seed=0)
        make_run(tmp_path / "s", weight_decay=decay, seed=1, optimizer="muon")
    assert compared(collect([tmp_path / "s"]).groups) == []


def test_dropout_begins_at_no_decay_or_at_none_of_the_references(tmp_path: Path) -> None:
    for decay, dropout, critical_count in (
        *((0.3, 0.0, 0.2), (1.0, 0.0, 2.0)),
        *((0.0, 0.1, 0.1), (0.0, 0.3, 0.5)),
    ):
        cell = {"weight_decay": decay, "dropout": dropout} if dropout else {"weight_decay": decay}
        make_run(tmp_path, seed=0, critical_count=critical_count, **cell)
    (comparison,) = compared(collect([tmp_path]).groups)
    assert [(c.name, c.decays) for c in comparison.curves] == [("dropout", (0.0, 0.0))]


def test_an_optimizer_at_two_learning_rates_is_two_settings(tmp_path: Path) -> None:
    for decay, critical_count in ((0.0, 0.02), (1.0, 2.0)):
        for more in ({}, *({"optimizer": "muon", "learning_rate": r} for r in (1e-3, 3e-3))):
            make_run(tmp_path, seed=0, weight_decay=decay, critical_count=critical_count, **more)
    (comparison,) = compared(collect([tmp_path]).groups)
    rates = {curve.changed["learning_rate"] for curve in comparison.curves}
    names = {curve.name for curve in comparison.curves}
    assert (rates, len(names)) == ({1e-3, 3e-3}, 2)


def test_an_unfinished_study_shows_what_is_there(tmp_path: Path) -> None:
    study = tmp_path / "s"
    make_run(study, weight_decay=0.3, seed=0, optimizer="muon", status="failed")
    for changed, points in (SETTINGS[0], SETTINGS[3]):
        for decay, critical_count in points:
            if (changed, decay) != (SETTINGS[3][0], 0.3):
                make_run(
                    study, weight_decay=decay, seed=0, critical_count=critical_count, **changed
                )
    make_run(study, weight_decay=0.3, seed=1, critical_count=0.2)
    page = render(collect([study]))
    assert "Does it matter, and what helps?" in page
    assert "Not run: dropout" in page
    assert "Whether it shows in a task was not measured" in page


def results(run: Any, counts: np.ndarray, better: float) -> Downstream:
    """60 reviews of 30 tokens; with `better` the losses are lower and more is right."""
    items = np.random.default_rng(0)
    own = np.random.default_rng(int(run.config["seed"]) + 10)
    seen = counts[items.integers(0, len(counts), 1800)]
    return Downstream(
        sentiment_correct=(own.random(60) < 0.6).astype(np.uint8),
        sentiment_rarity=items.random(60).astype(np.float32),
        token_review=np.repeat(np.arange(60), 30).astype(np.int32),
        token_count=seen,
        token_rank=own.integers(1, 30, 1800).astype(np.int32),
        token_loss=(5 - better + 0.1 * own.random(1800)).astype(np.float32),
        word_review=np.repeat(np.arange(60), 2).astype(np.int32),
        word_count=items.integers(0, 6, 120),
        word_rank=own.integers(1, 30, 120).astype(np.int32),
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    study = make(tmp_path_factory.mktemp("measured") / "s", seeds=(0, 1))
    for run in read_study(study).runs:
        counts = run.classes()["class_count"].values
        write_downstream(run.folder, results(run, counts, 0.5 * run.config["weight_decay"]))
    return collect([study])


def test_tasks_are_paired_by_item_and_seed(measured: Collection) -> None:
    found = section(measured.groups, measured.downstream)
    assert found is not None
    _, table = found.tables
    ((heading, rows),) = table.bodies
    assert heading.endswith("λ = 0 and 1 (n = 2)")
    (comparison,) = compared(measured.groups)
    group = comparison.group
    sides = []
    for decay in (0.0, 1.0):
        runs = group["run"].values[group["weight_decay"].values == decay]
        sides.append([read_downstream(measured.downstream[run]) for run in runs])
    pairs = zip(*sides, strict=True)
    apart = np.stack([high.token_loss - low.token_loss for low, high in pairs if low and high])
    band = paired_band(apart.astype(np.float64), sides[0][0].token_review)
    shown = {row[0]: row for row in rows}["next token, all: loss (nats)"]
    assert shown[3] == f"−{abs(band.mean):.3f} ± {band.half_width:.3f}"
    sentence = found.sentences[0]
    assert "No damage can be told in a task" in sentence
    assert "what decay took was memorised, and what it left was better learned" in sentence


def test_the_rise_of_the_loss_on_both_texts(measured: Collection) -> None:
    (comparison,) = compared(measured.groups)
    apart = rises(comparison.group, *comparison.span)
    assert apart is not None
    counts = comparison.group["class_count"].values
    loss = {
        decay: comparison.group["loss"].values[comparison.group["weight_decay"].values == decay]
        for decay in (0.0, 1.0)
    }
    for place, (low, high) in enumerate(
        zip(comparison.group["bin_low"].values, comparison.group["bin_high"].values, strict=True)
    ):
        own = (counts >= low) & (counts < high)
        if own.any():
            rise = ((loss[1.0] - loss[0.0])[:, own] * counts[own]).sum(axis=1) / counts[own].sum()
            np.testing.assert_allclose(apart[:, 0, place], rise)
            np.testing.assert_allclose(apart[:, 1, place], -0.5, atol=0.1)
    draws = [draw for draw, _ in drawings(measured.groups)]
    assert figures.alternatives in draws
    assert figures.new_text in draws


def test_runs_that_were_asked_different_things_are_not_compared(tmp_path: Path) -> None:
    study = make(tmp_path / "s", seeds=(0,))
    for run in read_study(study).runs:
        counts = run.classes()["class_count"].values
        half = results(run, np.roll(counts, int(10 * run.config["weight_decay"])), 0.0)
        write_downstream(run.folder, half)
    collection = collect([study])
    found = section(collection.groups, collection.downstream)
    assert found is not None
    assert "cannot be told: the models were asked different items" in found.sentences[0]
    assert "what helps?" in render(collection)


def test_a_damaged_file_of_results_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "s", weight_decay=0.0, seed=0)
    (run.folder / "downstream.safetensors").write_bytes(b"no")
    collection = collect([tmp_path / "s"])
    assert "not a file of results" in collection.problems[0].reason
