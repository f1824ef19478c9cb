"""What is read of the runs of a study, and what is named and left out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from reports.groups import end_bins
from reports.reading import Collection, collect
from reports.tests.studies import make_run, make_study
from run_store import attempt, read_study


def test_groups_are_the_settings_and_runs_are_in_order(collection: Collection) -> None:
    assert [group.attrs["name"] for group in collection.groups] == ["openelm-tiny", "qwen2-tiny"]
    for group in collection.groups:
        cells = list(zip(group["weight_decay"].values, group["seed"].values, strict=True))
        assert cells == [(d, s) for d in (0.0, 0.3, 1.0) for s in (0, 1)]


def test_same_settings_on_other_data_are_another_group(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.0, seed=0)
    other = make_run(tmp_path, weight_decay=1.0, seed=0)
    manifest = other.manifest | {"data_hash": "other text"}
    (other.folder / "manifest.json").write_text(json.dumps(manifest))
    assert len(collect([tmp_path]).groups) == 2


def test_no_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a study"):
        collect([tmp_path])
    with pytest.raises(ValueError, match="not a study"):
        collect([tmp_path / "absent"])


def test_one_run_in_two_studies_is_used_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, weight_decay=0.0, seed=0)
    found = collect([tmp_path / "a", tmp_path / "b"])
    assert [group.sizes["run"] for group in found.groups] == [1]
    assert [(note.path.split("/")[0], note.status) for note in found.problems] == [
        ("b", "unreadable")
    ]


def test_unreadable_files_are_named_and_kept(tmp_path: Path) -> None:
    folder = make_study(tmp_path / "study", weight_decays=(0.0, 1.0), seeds=(0, 1))
    cut, version, copied, _ = (run.folder for run in read_study(folder).runs)
    content = (cut / "classes.nc").read_bytes()
    (cut / "classes.nc").write_bytes(content[: len(content) // 2])
    manifest = (version / "manifest.json").read_text()
    (version / "manifest.json").write_text(
        manifest.replace('"format_version": 1', '"format_version": 99')
    )
    shutil.copytree(copied, folder / "0123456789ab")
    shutil.copytree(copied, folder / f"{copied.name} (copy)")
    (folder / "notes").mkdir()
    found = collect([folder])
    assert {note.path for note in found.problems} == {
        f"study/{cut.name}", f"study/{version.name}", "study/0123456789ab",
        f"study/{copied.name} (copy)",
    }  # fmt: skip
    assert all(note.reason for note in found.problems)
    assert sum(group.sizes["run"] for group in found.groups) == 2
    assert (cut / "classes.nc").stat().st_size == len(content) // 2


def test_every_number_is_that_of_the_store(study: Path, collection: Collection) -> None:
    """Recomputed from the raw arrays with plain loops."""
    seen = 0
    for run in read_study(study).runs:
        record, config = run.classes(), run.manifest["config"]
        group = next(g for g in collection.groups if g.attrs["name"] == config["model"])
        data = group.sel(run=run.id)
        counts = record["final_count"].values.tolist()
        loss = record["final_loss"].values.tolist()
        right = record["final_accuracy"].values.tolist()
        occurs = [k for k, n in enumerate(counts) if n > 0]
        average = sum(counts[k] * loss[k] for k in occurs) / sum(counts)
        balanced = sum(loss[k] for k in occurs) / len(occurs)
        assert float(data["average_loss"]) == pytest.approx(average, rel=1e-12)
        assert float(data["token_balanced_loss"]) == pytest.approx(balanced, rel=1e-12)
        assert float(data["token_balanced_perplexity"]) == pytest.approx(math.exp(balanced))
        accuracy = sum(right[k] for k in occurs) / len(occurs)
        assert float(data["token_balanced_accuracy"]) == pytest.approx(accuracy, rel=1e-12)
        assert int(data["neglected"]) == sum(right[k] == 0 for k in occurs)
        for place, (low, high) in enumerate(
            zip(data["bin_low"].values, data["bin_high"].values, strict=True)
        ):
            members = [loss[k] for k in occurs if low <= record["class_count"].values[k] < high]
            assert int(data["bin_size"][place]) == len(members)
            assert (low, high) == (3**place, 3 ** (place + 1))
            if members:
                mean = sum(members) / len(members)
                assert float(data["bin_loss"][place]) == pytest.approx(mean, rel=1e-12)
        rare, common = end_bins(group)
        gap = float(data["bin_loss"][rare] - data["bin_loss"][common])
        assert float(data["fairness_gap"]) == pytest.approx(gap, rel=1e-12)
        seen += 1
    assert seen == 12


def test_learning_speed_is_one_minus_the_area(study: Path, collection: Collection) -> None:
    run = read_study(study).runs[0]
    record = run.classes()
    group = next(g for g in collection.groups if run.id in g["run"].values)
    steps = record["step"].values
    at = group.sel(run=run.id)
    most: dict[int, float] = {}
    for k in range(295):
        losses = record["loss"].values[:, k].tolist()
        seen = [t for t, value in enumerate(losses) if not math.isnan(value)]
        assert float(at["windows_seen"][k]) == len(seen) / 20
        if not seen:
            assert math.isnan(at["learning_speed"][k])
            continue
        before = [losses[max((s for s in seen if s <= t), default=seen[0])] for t in range(20)]
        after = [losses[min((s for s in seen if s >= t), default=seen[-1])] for t in range(20)]
        expected = _speed(before, steps)
        assert float(at["learning_speed"][k]) == pytest.approx(expected, abs=1e-12)
        most[k] = _speed(after, steps)
    counts = record["class_count"].values
    for place, (low, high) in enumerate(
        zip(at["bin_low"].values, at["bin_high"].values, strict=True)
    ):
        members = [k for k in most if low <= counts[k] < high]
        if members:
            mean = sum(most[k] for k in members) / len(members)
            assert float(at["bin_speed_carried_back"][place]) == pytest.approx(mean, abs=1e-12)


def _speed(losses: list[float], steps: np.ndarray) -> float:
    low, high = min(losses), max(losses)
    if high == low:
        return 0.0
    scaled = [(value - low) / (high - low) for value in losses]
    return float(1 - np.trapezoid(scaled, steps) / (steps[-1] - steps[0]))


def test_the_fit_finds_the_critical_count_that_was_put_in(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.5, seed=0, critical_count=7.0)
    (group,) = collect([tmp_path]).groups
    assert float(group["critical_count"][0]) == pytest.approx(7.0, rel=0.03)
    assert float(group["r_squared"][0]) > 0.97


def test_unfinished_and_missing_runs_are_listed(collection: Collection) -> None:
    notes = {(note.status, note.what, note.reason) for note in collection.unfinished}
    name = "openelm-tiny, weight decay"
    assert ("diverged", f"{name} 2, seed 0", "loss is not finite at step 70") in notes
    (why,) = (note.reason for note in collection.unfinished if note.status == "lost")
    assert ("lost", f"{name} 0.3, seed 2", why) in notes
    assert why.endswith("is gone")
    assert {note for note in notes if note[0] == "missing"} == {
        ("missing", f"{name} {cell}", "")
        for cell in ("0, seed 2", "1, seed 2", "2, seed 1", "2, seed 2")
    }
    assert not collection.problems


def test_a_run_without_a_final_evaluation_is_listed_with_what_to_do(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.0, seed=0, evaluate="final")
    streamed = make_run(tmp_path, weight_decay=0.0, seed=1, evaluate="stream")
    make_run(tmp_path, weight_decay=0.0, seed=2, evaluate="stream", status="diverged")
    found = collect([tmp_path])
    assert [group.sizes["run"] for group in found.groups] == [1]
    notes = {note.status: note for note in found.unfinished if note.status != "missing"}
    assert notes.keys() == {"not evaluated", "diverged"}
    assert notes["not evaluated"].path.endswith(streamed.id)
    assert "--evaluate final" in notes["not evaluated"].reason
    assert not found.problems


def test_a_run_that_somebody_holds_is_running(tmp_path: Path) -> None:
    run = make_run(tmp_path, weight_decay=0.0, seed=0, status="running")
    with attempt(run):
        assert [note.status for note in collect([tmp_path]).unfinished] == ["running"]
