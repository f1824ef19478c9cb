"""Floor, excess, law and prediction of a group, against sums written out; and what is lacking."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from frequency_bins import fit_excess_loss
from reports import figures
from reports.answer import answer
from reports.excess import LAW, decays_with_excess, fitted_law, why_no_excess
from reports.excess_tables import excess_law, excess_views, predicted_losses
from reports.groups import for_drawing
from reports.page import drawings, render
from reports.reading import Collection, collect
from reports.tests.studies import make_run, zipf_counts
from run_store import class_record, publish

V = 300
COUNTS = zipf_counts(V, never=5)
FLOOR = 0.05 + 0.02 * np.cos(np.arange(V))
KAPPA = {"decay_mode": "decoupled", "warmup_steps": 0, "schedule": "constant"}
RATES = 2e-3 * 2000  # make_run's learning rate and steps


def put(
    folder: Path,
    decay: float,
    seed: int,
    loss: np.ndarray,
    counts: np.ndarray = COUNTS,
    **config: Any,
) -> None:
    """A finished run with these final losses."""
    run = make_run(folder, weight_decay=decay, seed=seed, status="running", **config)
    seen = counts > 0
    loss = np.where(seen, loss, np.nan)
    accuracy = np.where(seen, np.exp(-np.nan_to_num(loss)), np.nan)
    publish(
        run,
        class_record(
            steps=[100, 200],
            class_counts=counts,
            labels=[f"t{k}" for k in range(len(counts))],
            count=np.stack([counts, counts]),
            loss=np.stack([loss + 1, loss]),
            accuracy=np.stack([accuracy, accuracy]),
            final_count=counts,
            final_loss=loss,
            final_accuracy=accuracy,
        ),
    )


def saturating(decay: float, counts: np.ndarray = COUNTS) -> np.ndarray:
    """decay (1 + n/4)^-1/2, written out."""
    return np.array([decay / math.sqrt(1 + n / 4) for n in counts])


def only(folder: Path) -> xr.Dataset:
    """The one group of a study."""
    (group,) = collect([folder]).groups
    return group


def slow_mean(octave: int, values: np.ndarray) -> float:
    members = [k for k in range(V) if COUNTS[k] and int(COUNTS[k]).bit_length() == octave + 1]
    return sum(COUNTS[k] * values[k] for k in members) / sum(COUNTS[k] for k in members)


@pytest.fixture(scope="module")
def lawful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds with their own floors, the second's without decay 1; a third without decay 0."""
    folder = tmp_path_factory.mktemp("lawful")
    for seed in (0, 1):
        floor = FLOOR * (1 + seed)
        put(folder, 0.0, seed, floor, **KAPPA)
        put(folder, 0.1, seed, floor + saturating(0.1 + 0.02 * seed), **KAPPA)
    put(folder, 1.0, 0, FLOOR + saturating(1.0), **KAPPA)
    put(folder, 0.1, 2, FLOOR + 3, **KAPPA)
    return folder


def test_pairs_floor_and_excess_against_sums_written_out(lawful: Path) -> None:
    group = only(lawful)
    assert group["pairs"].values.tolist() == [2, 1]
    assert decays_with_excess(group) == [0.1, 1.0]
    for octave in range(group.sizes["octave"]):
        small, strong = (group.isel(decayed=place, octave=octave) for place in (0, 1))
        assert float(small["floor"]) == pytest.approx(1.5 * slow_mean(octave, FLOOR))
        a, b = (slow_mean(octave, saturating(0.1 + 0.02 * seed)) for seed in (0, 1))
        assert float(small["excess"]) == pytest.approx((a + b) / 2)
        # t(0.975, 1) = 12.7062
        assert float(small["excess_half_width"]) == pytest.approx(12.7062047 * abs(a - b) / 2)
        assert float(small["octave_count"]) == pytest.approx(slow_mean(octave, COUNTS))
        assert float(strong["excess"]) == pytest.approx(slow_mean(octave, saturating(1.0)))
        assert math.isnan(strong["excess_half_width"])


def test_the_law_gives_back_what_was_put_in(lawful: Path) -> None:
    group = only(lawful)
    for decay, amplitude in ((0.1, 0.11), (1.0, 1.0)):
        law, errors = fitted_law(group, decay)
        assert [law[name] for name in LAW] == pytest.approx([amplitude, 4, 0.5, 1], rel=1e-5)
        assert all(error < 1e-3 for error in errors.values())
    assert group["preferred"].values.tolist() == ["saturating", "saturating"]
    assert answer([group]).relation == (
        "What decay adds is no straight line in the count: a token ten times rarer pays about "
        "3.2 times as much, down to about n_0 = 4 occurrences, below which all pay alike."
    )


def test_kappa_is_of_each_run(lawful: Path) -> None:
    group = only(lawful)
    expected = group["weight_decay"].values * RATES
    np.testing.assert_allclose(group["kappa"].values, expected)


def test_predictions_are_of_the_seeds_that_all_three_runs_have(lawful: Path) -> None:
    frame = predicted_losses(only(lawful))
    assert set(frame["weight_decay"]) == {1.0}
    assert set(frame["predicted_from"]) == {0.1}
    for octave, row in enumerate(frame.itertuples()):
        without, at = slow_mean(octave, FLOOR), slow_mean(octave, FLOOR + saturating(0.1))
        margins = [math.log((V - 1) / math.expm1(loss)) for loss in (without, at)]
        s = math.log(margins[0] / margins[1])  # times 10, as kappa is
        predicted = math.log1p((V - 1) * math.exp(-margins[0] * math.exp(-10 * s)))
        assert row.first_order == pytest.approx(predicted)
        measured = slow_mean(octave, FLOOR + saturating(1.0))
        assert row.measured == pytest.approx(measured)
        assert row.first_order_error == pytest.approx(predicted / measured - 1)


def test_points_are_measured_and_lines_predicted(lawful: Path) -> None:
    group = only(lawful)
    (axis,) = figures.predictions(group).axes
    points, line = axis.lines  # of the one decay above the smallest
    frame = predicted_losses(group)
    assert points.get_ydata().tolist() == frame["measured"].tolist()
    assert line.get_ydata()[: len(frame)].tolist() == frame["second_order"].tolist()
    assert axis.get_legend().get_title().get_text() == "from λ = 0.1"


def test_a_seed_without_the_small_decay_is_not_compared(tmp_path: Path) -> None:
    for decay in (0.0, 0.1, 1.0):
        put(tmp_path, decay, 0, FLOOR + saturating(decay), **KAPPA)
    for decay in (0.0, 1.0):
        put(tmp_path, decay, 1, 2 * FLOOR + saturating(decay), **KAPPA)
    group = only(tmp_path)
    assert group["pairs"].values.tolist() == [1, 2]
    for octave, measured in enumerate(group["measured"].sel(decayed=1.0).values):
        assert measured == pytest.approx(slow_mean(octave, FLOOR + saturating(1.0)))


def test_a_margin_law_record_is_predicted(tmp_path: Path) -> None:
    """M(kappa) = M(0) exp(-kappa s) in every class: the first order predicts nearly all of it."""
    margin = 4 + 0.3 * np.log(np.maximum(COUNTS, 1))
    share = 0.8 / (1 + np.log1p(COUNTS))
    for decay in (0.0, 0.02, 0.1):
        kept = margin * np.exp(-decay * RATES * share)
        put(tmp_path, decay, 0, np.log1p((V - 1) * np.exp(-kept)), **KAPPA)
    frame = predicted_losses(only(tmp_path))
    assert frame["first_order_error"].abs().max() < 0.01
    view = excess_views([only(tmp_path)])[1]
    assert view.title == "Predicted and measured"
    assert view.bodies[0][0] == "openelm-tiny, λ = 0.1 from λ = 0.02"
    row = frame.iloc[0]
    assert view.bodies[0][1][0][:3] == ["1", f"{row.measured:.4f}", f"{row.first_order:.4f}"]


def test_no_kappa_no_prediction(tmp_path: Path) -> None:
    for decay in (0.0, 0.1, 1.0):
        put(tmp_path, decay, 0, FLOOR + saturating(decay), decay_mode="l2")
    group = only(tmp_path)
    assert group["kappa"].isnull().all()
    assert predicted_losses(group).empty
    assert [view.key for view in excess_views([group])] == ["table-excess"]


def test_the_figure_shows_floor_excess_and_law(lawful: Path) -> None:
    group = only(lawful)
    figure = figures.theory_over_losses(for_drawing(group))
    assert len(figure.axes) == 2
    floor, points, law = figure.axes[1].lines
    strong = group.isel(decayed=1)
    np.testing.assert_allclose(floor.get_ydata(), strong["floor"].values)
    np.testing.assert_allclose(points.get_ydata(), strong["excess"].values)
    np.testing.assert_allclose(law.get_ydata(), (1 + law.get_xdata() / 4) ** -0.5, rtol=1e-5)
    assert "at weight decay 1: A = 1 ± " in figure.alt


def _no_run_at_decay_0(folder: Path) -> None:
    for decay in (0.1, 1.0):
        put(folder, decay, 0, FLOOR + saturating(decay))


def _other_seeds(folder: Path) -> None:
    put(folder, 0.0, 0, FLOOR)
    put(folder, 1.0, 1, FLOOR + saturating(1.0))


def _only_decay_0(folder: Path) -> None:
    for seed in (0, 1):
        put(folder, 0.0, seed, FLOOR * (1 + seed))


def _two_at_decay_0(folder: Path) -> None:
    counts = 3 ** np.arange(5)
    for decay, order in ((0.0, counts), (0.0, counts[::-1]), (1.0, counts)):
        shuffled = {"class_counts": order.tolist(), "shuffle_classes": True}
        put(folder, decay, 0, 0.1 + decay / order, order, **shuffled)


def _two_bins(folder: Path) -> None:
    counts = np.array([1] * 10 + [2] * 10)
    for decay in (0.0, 1.0):
        put(folder, decay, 0, 0.1 + saturating(decay, counts), counts)


def _all_losses_equal(folder: Path) -> None:
    for decay in (0.0, 1.0):
        put(folder, decay, 0, np.full(V, 0.1 + decay))


def _no_excess(folder: Path) -> None:
    put(folder, 0.0, 0, FLOOR + 0.1)
    put(folder, 1.0, 0, FLOOR)


def _equal_counts(folder: Path) -> None:
    counts = np.full(20, 50)
    for decay in (0.0, 1.0):
        put(folder, decay, 0, np.full(20, 0.1 + decay), counts)


def _few_classes(folder: Path) -> None:
    counts = 2 ** np.arange(10)
    for decay in (0.0, 1.0):
        put(folder, decay, 0, 0.1 + decay / np.sqrt(counts), counts)


def _worse_than_chance(folder: Path) -> None:
    for decay in (0.0, 0.1, 1.0):
        put(folder, decay, 0, FLOOR + 100 * decay / np.sqrt(np.maximum(COUNTS, 1)), **KAPPA)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_no_run_at_decay_0, "no run at decay 0"),
        (_other_seeds, "no run at decay 0 of the same seed"),
        (_only_decay_0, "no run with weight decay"),
        (_two_at_decay_0, "2 runs at decay 0 with seed 0"),
        (_two_bins, "2 of 2 bins of factor 2 have a positive mean excess; expected at least 3"),
        (_all_losses_equal, "in every bin; expected one that varies"),
        (_no_excess, "0 of 11 bins of factor 2 have a positive mean excess; expected at least 3"),
        (_equal_counts, "1 of 1 bins of factor 2 have a positive mean excess; expected at least 3"),
        (_few_classes, ""),
        (_worse_than_chance, ""),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_lacking_is_said(
    make: Callable[[Path], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    collection = collect([tmp_path])
    assert not collection.problems
    frame = excess_law(*collection.groups)
    assert all(note.endswith(reason) if reason else not note for note in frame["note"])
    draw_only(monkeypatch, ("glance", "theory_over_losses", "critical_count"))
    page = render(collection)
    assert not reason or f"{reason}</td>" in page
    assert "nan" not in page.lower().replace("nano", "")
    for view in excess_views(collection.groups):
        assert not [
            cell for _, rows in view.bodies for row in rows for cell in row if cell == "nan"
        ]
    for group in collection.groups:
        figures.theory_over_losses(group)


def draw_only(monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
    """Pages with these figures alone: drawing takes nearly all of a page's time."""
    monkeypatch.setattr(
        "reports.page.drawings",
        lambda groups: [d for d in drawings(groups) if d[0].__name__ in names],
    )


def test_without_decay_0_the_fitted_count_is_drawn_instead(tmp_path: Path) -> None:
    _no_run_at_decay_0(tmp_path)
    group = only(tmp_path)
    drawn = [draw for draw, _ in drawings([group])]
    assert figures.critical_count in drawn
    assert figures.theory_over_losses not in drawn
    assert why_no_excess(group) == "no run at decay 0"
    assert answer([group]).relation == ""
    alone = figures.theory_over_losses(group)
    assert "No excess: no run at decay 0" in [t.get_text() for t in alone.axes[0].texts]


def test_a_class_without_a_loss_in_one_run_is_left_out_of_all(tmp_path: Path) -> None:
    put(tmp_path, 0.0, 0, np.where(np.arange(V) == 3, np.nan, FLOOR))
    put(tmp_path, 1.0, 0, FLOOR + saturating(1.0))
    counts = np.where(np.arange(V) == 3, 0, COUNTS)
    expected = fit_excess_loss(counts, saturating(1.0))
    law, _ = fitted_law(only(tmp_path), 1.0)
    assert law["amplitude"] == pytest.approx(expected.amplitude)


def test_the_law_that_does_not_stand_is_not_in_the_answer(collection: Collection) -> None:
    group = collection.groups[0]
    assert "ten times rarer" in answer([group]).relation
    for place, value in ((3, 0.89), (2, math.nan)):
        law = group["law"].copy()
        law[:, place] = value
        assert answer([group.assign(law=law)]).relation == ""
    errors = group["law_error"].copy()
    errors[:, 2] = math.inf
    assert answer([group.assign(law_error=errors)]).relation == ""
