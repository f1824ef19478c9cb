"""Runs as small files: what a report says of them is what it says of the runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frequency_bins import FrequencyBins
from llm_experiments.predict_decay import predict_decay
from reports.__main__ import main
from reports.reading import Collection, collect
from reports.tests.studies import make_study
from run_store import read_study

MEASURED = Path(__file__).parents[2] / "measured" / "table1"
LOSSES = ("loss", "bin_loss", "bin_loss_std", "average_loss", "token_balanced_loss")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study, and its runs as small files."""
    folder = tmp_path_factory.mktemp("small")
    study = make_study(folder / "runs" / "s", weight_decays=(0.0, 1.0), seeds=(0,), vocab_size=100)
    assert main(["shrink", str(study), "--out", str(folder / "measured" / "s")]) == 0
    return study, folder / "measured" / "s"


def test_a_report_of_small_files_is_one_of_the_runs(small: tuple[Path, Path]) -> None:
    (whole,), (shrunken,) = (collect([folder]).groups for folder in small)
    assert whole["run"].values.tolist() == shrunken["run"].values.tolist()
    assert whole["label"].values.tolist() == shrunken["label"].values.tolist()
    for name in LOSSES:  # which are kept with seven digits
        np.testing.assert_allclose(shrunken[name], whole[name], rtol=1e-5)
    # Hits are whole; the accuracies of this study are made up.
    off = abs(shrunken["accuracy"] - whole["accuracy"]) * whole["class_count"]
    assert off.max() <= 0.5 + 1e-9
    assert shrunken["learning_speed"].isnull().all()
    assert shrunken["windows_seen"].isnull().all()


def test_windows_are_means_over_the_tokens_of_a_bin(small: tuple[Path, Path]) -> None:
    run = read_study(small[0]).runs[0]
    record = run.classes()
    windows = json.loads((small[1] / f"{run.id}.json").read_text())["windows"]
    index = FrequencyBins.powers(record["class_count"].values, base=2).index.numpy()
    for place in range(len(windows["bin_low"])):
        mine = (index == place) & (record["count"].values[7] > 0)
        if mine.any():
            count, loss = (record[name].values[7][mine] for name in ("count", "loss"))
            expected = (count * loss).sum() / count.sum()
            assert windows["loss"][7][place] == pytest.approx(expected, rel=1e-6)


def test_its_page_has_no_figure_of_training_and_no_nan(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    assert main(["build", str(small[1]), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8").lower()
    assert "figure 6a" in page
    assert "figure 7b" not in page
    assert ">nan" not in page
    assert " nan " not in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("labels"), "labels"),
        (lambda d: d["class_count"].pop(), "class_count are not 100 numbers"),
        (lambda d: d["class_count"].__setitem__(0, -1), "counts of at least 0"),
        (lambda d: d["final_correct"].__setitem__(0, 10**9), "outside 0..1"),
        (lambda d: d["final_correct"].__setitem__(0, None), "final_correct are not"),
        (lambda d: d["final_loss"].__setitem__(0, "0"), "final_loss are not"),
        (lambda d: d["labels"].__setitem__(0, 7), "label 7"),
        (lambda d: d["manifest"]["config"].__setitem__("seed", 9), "not the finished run"),
        (lambda d: d["manifest"].__setitem__("status", "failed"), "not the finished run"),
        (lambda d: d["windows"].__setitem__("step", []), "not a shrunken run"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(
    small: tuple[Path, Path], change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(small[1], folder)
    path = sorted(folder.iterdir())[0]
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    found: Collection = collect([folder])
    assert [note.path for note in found.problems] == [f"s/{path.name}"]
    assert said in found.problems[0].reason
    assert len(found.groups) == 1


def test_nothing_to_shrink(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s").mkdir()
    assert main(["shrink", str(tmp_path / "s"), "--out", str(tmp_path / "out")]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_runs_at_full_size_are_those_of_the_paper() -> None:
    """Accuracies within the paper's spread; losses as Table 1 has them, but higher."""
    assert max(path.stat().st_size for path in MEASURED.iterdir()) < 1_000_000
    (group,) = collect([MEASURED]).groups
    assert group["weight_decay"].values.tolist() == [0.0, 1.0]
    np.testing.assert_allclose(group["average_loss"], [0.0530, 0.0752], atol=5e-5)
    np.testing.assert_allclose(group["token_balanced_loss"], [0.0728, 0.2031], atol=5e-5)
    np.testing.assert_allclose(group["token_balanced_accuracy"], [0.98800, 0.98702], atol=5e-6)


def test_decays_are_predicted_from_small_files() -> None:
    """From the run itself its own losses: those of the 1,197 tokens that occur once."""
    (found,), reasons = predict_decay(MEASURED, [1.0])
    assert not reasons
    assert found.kappa == pytest.approx(0.25, rel=1e-3)  # decay 1, half of 10,000 steps at 5e-5
    document = json.loads((MEASURED / "8a0ab5eee4c6.json").read_text())
    once = np.array(document["class_count"]) == 1
    expected = np.array(document["final_loss"], dtype=float)[once].mean()
    assert found.predicted[1.0].mean[0] == pytest.approx(expected, rel=1e-6)
