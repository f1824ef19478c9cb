"""Tables against an independent computation from the store."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from reports import tables
from reports.groups import effective_counts
from reports.published import published_table_1
from reports.reading import Collection, collect
from reports.table_views import table_views, verdict_view
from reports.tests.studies import make_run, make_study, record, zipf_counts
from run_store import publish, read_study
from ufm import fit_critical_count
from ufm.verification import verify


def _final(study: Path, model: str, weight_decay: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """(final_count, final_loss) of the finished runs, by seed."""
    runs = list(read_study(study).runs)
    chosen = [
        run
        for run in runs
        if run.config["model"] == model and run.config["weight_decay"] == weight_decay
    ]
    records = [run.classes() for run in chosen]
    return [(record["final_count"].values, record["final_loss"].values) for record in records]


def test_table_1_to_the_printed_digit(study: Path, collection: Collection) -> None:
    view = next(view for view in table_views(collection.groups) if view.key == "table-1")
    assert list(view.head) == ["", "λ = 0", "λ = 0.3", "λ = 1"]
    for heading, rows in view.bodies:
        model = heading.split()[0]
        assert heading.endswith("(n = 2)")
        for column, decay in enumerate((0.0, 0.3, 1.0), start=1):
            finals = _final(study, model, decay)
            average = [float(np.nansum(n * loss) / n.sum()) for n, loss in finals]
            balanced = [float(np.nanmean(loss)) for _, loss in finals]
            perplexity = [math.exp(value) for value in balanced]
            for row, values in zip(rows, (average, balanced, perplexity), strict=False):
                mean, std = statistics.mean(values), statistics.stdev(values)
                assert row[column] == f"{mean:.3f} ± {std:.3f}"


def test_speed_by_bin_tells_absence_from_slowness(collection: Collection) -> None:
    frame = tables.speed_by_bin(*collection.groups)
    seen, held = frame["windows_seen"], frame["tokens"] > 0
    assert (np.diff(seen[held & (frame["runs"] == "qwen2-tiny")].values[::3]) >= 0).all()
    # The study's losses only fall, and its frequent tokens are in every window.
    gain = frame["carried_back"] - frame["mean"]
    assert (gain >= -1e-12)[held].all()
    assert (gain > 1e-12)[held & (seen < 0.5)].all()
    assert (gain.abs() < 1e-12)[held & (seen == 1)].all()
    assert (seen[held].min(), seen[held].max()) == (pytest.approx(0.066, abs=0.01), 1)


def test_loss_by_bin_covers_every_class_and_token(study: Path, collection: Collection) -> None:
    frame = tables.loss_by_bin(*collection.groups)
    for name, part in frame.groupby("runs"):
        one = part[part["weight_decay"] == 0.0]
        count, _ = _final(study, str(name), 0.0)[0]
        assert one["tokens"].sum() == (count > 0).sum()
        assert one["share_of_text"].sum() == pytest.approx(1.0)
        whole = sum(float(np.nanmean(loss)) for _, loss in _final(study, str(name), 0.0)) / 2
        weighted = (one["tokens"] * one["mean"]).sum() / one["tokens"].sum()
        assert weighted == pytest.approx(whole)


def test_theory_table_counts(study: Path, collection: Collection) -> None:
    frame = tables.theory(*collection.groups)
    assert len(frame) == 6
    assert frame["neglected"].max() > 0
    for row in frame.itertuples():
        runs = [run for run in read_study(study).runs if run.config["model"] == row.runs]
        runs = [run for run in runs if run.config["weight_decay"] == row.weight_decay]
        measured = [int((run.classes()["final_accuracy"].values == 0).sum()) for run in runs]
        assert row.n == len(measured) == 2
        assert row.neglected == statistics.mean(measured)


def test_a_gap_interval_is_welch(study: Path, collection: Collection) -> None:
    frame = tables.runs(*collection.groups).set_index("run")
    run = read_study(study).runs[0]
    record = run.classes()
    counts, loss = record["class_count"].values, record["final_loss"].values
    top = 3 ** int(math.log(counts.max(), 3))
    rare, common = loss[(counts >= 1) & (counts < 3)], loss[counts >= top]
    assert len(common) > 1
    interval = stats.ttest_ind(rare, common, equal_var=False).confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    assert frame.loc[run.id, "fairness_gap_half_width"] == pytest.approx(half, rel=1e-9)


def test_no_repair_table_without_repair(collection: Collection) -> None:
    assert tables.repair(*collection.groups).empty


def test_repair_predictions(tmp_path: Path) -> None:
    """With weights n^-1/2 the theory says that every loss is the same number."""
    for exponent in (0, 0.25, 0.5):
        make_run(
            tmp_path, weight_decay=1.0, seed=0, critical_count=3.0, loss_weight_exponent=exponent
        )
    groups = collect([tmp_path]).groups
    assert len(groups) == 3
    frame = tables.repair(*groups).set_index("loss_weight_exponent")
    fitted = float(
        next(g for g in groups if g.attrs["config"]["loss_weight_exponent"] == 0)["critical_count"][
            0
        ]
    )
    n = groups[0]["class_count"].values.astype(float)
    vocab_size, n = len(n), n[n > 0]
    # 1/r_k = (1 - 1/V) sqrt(n_c) sum(sqrt n) / N, the same for all: ufm/THEORY.md, section 6
    chance = (1 - 1 / vocab_size) * math.sqrt(fitted) * np.sqrt(n).sum() / n.sum()
    assert frame.loc[0.5, "predicted_balanced"] == pytest.approx(-math.log1p(-chance))
    assert frame.loc[0.5, "predicted_average"] == pytest.approx(-math.log1p(-chance))
    root = (1 - 1 / vocab_size) * np.minimum(1, np.sqrt(fitted / n))
    assert frame.loc[0, "predicted_balanced"] == pytest.approx(float(-np.log1p(-root).mean()))
    assert frame.loc[0.25, "predicted_balanced"] < frame.loc[0, "predicted_balanced"]
    assert frame.loc[0.25, "predicted_average"] < frame.loc[0, "predicted_average"]


def test_repairs_stand_at_the_decays_they_share_under_their_models_name(tmp_path: Path) -> None:
    for model in ("a", "b"):
        for weight_decay in (0.0, 1.0):
            make_run(tmp_path, weight_decay=weight_decay, seed=0, model=model)
        make_run(tmp_path, weight_decay=1.0, seed=0, model=model, loss_weight_exponent=0.25)
        make_run(tmp_path, weight_decay=1.0, seed=0, model=model, decay="matrices")
    groups = collect([tmp_path]).groups
    view = next(v for v in table_views(groups) if v.key == "table-repair")
    assert [heading for heading, _ in view.bodies] == ["a at weight decay 1", "b at weight decay 1"]
    for _, rows in view.bodies:
        assert {row[0] for row in rows} == {
            "g = 0, decay on all", "g = 0.25, decay on all", "g = 0, decay on matrices",
        }  # fmt: skip


def test_one_seed_has_a_gap_interval_over_tokens(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=1.0, seed=0)
    (group,) = collect([tmp_path]).groups
    view = next(v for v in table_views([group]) if v.key == "table-gap")
    gap, half = (float(group[f"fairness_gap{end}"][0]) for end in ("", "_half_width"))
    assert view.bodies[0][1][0][1] == f"{gap:.3f} ± {half:.3f}"


def test_repair_without_a_baseline_predicts_nothing(tmp_path: Path) -> None:
    for exponent in (0.25, 0.5):
        make_run(tmp_path, weight_decay=1.0, seed=0, loss_weight_exponent=exponent)
    groups = collect([tmp_path]).groups
    assert tables.repair(*groups)["predicted_average"].isna().all()
    assert "table-repair" in [view.key for view in table_views(groups)]


def test_a_weighted_run_is_fitted_by_the_weighted_law(tmp_path: Path) -> None:
    """Losses made by r_k (ufm/THEORY.md, section 6), written out, give back the n_c put in."""
    counts = zipf_counts(300)
    n = counts[counts > 0].astype(float)
    weights = n**-0.25 * n.sum() / (n**0.75).sum()
    assert (weights * n).sum() == pytest.approx(n.sum())
    at = effective_counts(n, counts, 0.25)
    np.testing.assert_allclose(at, weights**2 * n)
    # 1/r_k = N c / (a_k sqrt(n_k)) with N c = (1 - 1/V) sqrt(n_c)
    inverse = np.minimum(1 - 1 / 300, (1 - 1 / 300) * math.sqrt(2.0) / (weights * np.sqrt(n)))
    fit = fit_critical_count(at, -np.log1p(-inverse), vocab_size=300)
    assert fit.critical_count == pytest.approx(2.0)
    loss = tables.law_loss(at, 2.0, vocab_size=300)
    np.testing.assert_allclose(loss, -np.log1p(-inverse))


def test_published_beside_measured(tmp_path: Path) -> None:
    setting = {
        "model": "openelm-270m", "corpus": "imdb", "batch_size": 64, "context": 128,
        "learning_rate": 5e-5, "steps": 100, "vocab_size": 32005,
    }  # fmt: skip
    for seed in (0, 1):
        run = make_run(tmp_path / "a", weight_decay=1.0, seed=seed, status="running", **setting)
        publish(run, record(zipf_counts(300), 1.0, seed))
    groups = collect([tmp_path / "a"]).groups
    frame = published_table_1(*groups)
    row = frame[frame["metric"] == "Per-token loss"].iloc[0]
    assert (row["published"], row["published_std"]) == (0.163, 0.004)
    mean = float(groups[0]["token_balanced_loss"].mean())
    assert row["difference"] == pytest.approx(mean - 0.163)
    assert round(row["predicted"], 3) == 0.117  # written out in frequency_bins' test of the law
    assert frame[frame["metric"] != "Per-token loss"]["predicted"].isna().all()
    view = next(v for v in table_views(groups) if v.key == "table-published")
    assert f"{mean - 0.163:+.3f}" in [cell for _, rows in view.bodies for r in rows for cell in r]
    for other in ({"steps": 9_999}, {"batch_size": 32}, {"loss_weight_exponent": 0.25}):
        changed = groups[0].assign_attrs(config=groups[0].attrs["config"] | other)
        assert published_table_1(changed).empty


def test_every_verdict_is_shown_with_both_forms() -> None:
    view = verdict_view()
    ((_, rows),) = view.bodies
    claims = verify()
    assert [row[0] for row in rows] == [claim.name for claim in claims]
    for row, claim in zip(rows, claims, strict=True):
        assert row[2:4] == [claim.printed, claim.corrected]
        assert row[-1] == claim.verdict
        assert (row[4] in ("0", "< 1e-9")) == (claim.printed_error <= 1e-9)
    assert any("refuted" in row[-1] for row in rows)


def test_comparison_pairs_and_differences(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 2.0)):
        for seed in (0, 1, 2):
            make_run(tmp_path / name, weight_decay=0.5, seed=seed, critical_count=scale, context=64)
    make_run(tmp_path / "b", weight_decay=1.0, seed=0)
    first, second = (collect([tmp_path / name]).groups for name in "ab")
    frame = tables.comparison(first, second).set_index("metric")
    assert set(frame["weight_decay"]) == {0.5}
    a = first[0]["average_loss"].values
    b = second[0]["average_loss"].values[second[0]["weight_decay"].values == 0.5]
    assert frame.loc["Training loss", "difference"] == pytest.approx(b.mean() - a.mean())
    interval = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    half = (interval.high - interval.low) / 2
    assert frame.loc["Training loss", "half_width"] == pytest.approx(half)


def test_uneven_seeds_are_said(tmp_path: Path) -> None:
    make_study(tmp_path, weight_decays=(0.0, 1.0), seeds=(0,))
    make_run(tmp_path, weight_decay=0.0, seed=1)
    view = next(v for v in table_views(collect([tmp_path]).groups) if v.key == "table-1")
    ((heading, rows),) = view.bodies
    assert heading.endswith("(n = 1–2)")
    assert "±" in rows[0][1]
    assert "±" not in rows[0][2]
