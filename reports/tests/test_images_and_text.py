"""A page over a study of text and one of images: each in its own words, figures and tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reports import figures
from reports.answer import image_answer
from reports.page import drawings, render
from reports.reading import Collection, collect
from reports.table_views import theory_view
from reports.tables import class_falls
from run_store import Run, class_record, publish

COUNTS = {"balanced": [40] * 6, "few": [60, 50, 40, 9, 6, 3]}
# Test accuracy in % by weight decay, class and seed 0; seed 1 has a point less everywhere else.
ACCURACY = {
    "balanced": {0.0: [90, 90, 90, 90, 90, 90], 0.1: [80, 81, 79, 80, 80, 80]},
    "few": {0.0: [90, 90, 90, 80, 80, 80], 0.1: [90, 89, 91, 60, 50, 30]},
}


def make_images(folder: Path) -> Path:
    for imbalance, by_decay in ACCURACY.items():
        counts = np.array(COUNTS[imbalance])
        for decay, accuracy in by_decay.items():
            for seed in (0, 1):
                config = {"model": "resnet9", "imbalance": imbalance, "weight_decay": decay}
                run = Run.create(folder, config | {"seed": seed, "steps": 1})
                tested = np.array([accuracy]) / 100 - (0.01 * seed if decay else 0)
                ones = np.ones((1, 6))
                record = class_record(
                    steps=[1], class_counts=counts, labels=list("abcdef"),
                    count=ones.astype(int), loss=ones, accuracy=ones, final_count=counts,
                    final_loss=(1 + decay) / np.sqrt(counts), final_accuracy=ones[0],
                    test_count=ones.astype(int), test_accuracy=tested,
                )  # fmt: skip
                publish(run, record)
    return folder


@pytest.fixture(scope="module")
def both(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return collect([study, make_images(tmp_path_factory.mktemp("images") / "images")])


def test_falls_are_paired_by_seed(both: Collection) -> None:
    images = [group for group in both.groups if "imbalance" in group.attrs["config"]]
    falls = class_falls(*images).set_index("runs")
    few = falls.loc["resnet9, imbalance few"]
    # Seed 0: (20 + 30 + 50) / 3 and (0 + 1 - 1) / 3; seed 1 falls by one point more.
    assert few["rare"] == pytest.approx(100 / 3 + 0.5)
    assert few["frequent"] == pytest.approx(0.5)
    assert few["difference"] == pytest.approx(100 / 3)
    assert few["difference_half_width"] == pytest.approx(0, abs=1e-9)
    assert few["rare_half_width"] == pytest.approx(
        12.706 * np.std([0, 1], ddof=1) / np.sqrt(2), rel=1e-4
    )
    assert (few["least"], few["most"]) == pytest.approx((-0.5, 50.5))
    assert not few["balanced"]
    assert falls.loc["resnet9, imbalance balanced", "balanced"]


def test_both_kinds_answer_in_their_own_words(both: Collection) -> None:
    names = [group.attrs["name"] for group in both.groups]
    assert names == [
        "openelm-tiny", "qwen2-tiny", "resnet9, imbalance balanced", "resnet9, imbalance few",
    ]  # fmt: skip
    said = image_answer(both.groups[2:])
    assert "fallen further than the three most frequent at weight decay 0.1, by 33 ± 0" in said
    assert (
        "(resnet9, imbalance balanced), weight decay 0.1 changed their test accuracies by " in said
    )
    assert "between −12 and −10 points" in said
    assert image_answer([]) == ""


def test_figures_show_their_kind_alone(both: Collection) -> None:
    for draw, shown in drawings(both.groups):
        of_images = [group.attrs["name"].startswith("resnet9") for group in shown]
        for_images = draw in (figures.figure_9, figures.theory_over_images)
        assert all(of_images) if for_images else not any(of_images)


def test_the_laws_are_fitted_to_uneven_images(both: Collection) -> None:
    law = dict(drawings(both.groups))[figures.theory_over_images]
    assert [group.attrs["name"] for group in law] == ["resnet9, imbalance few"]
    # make_images has the losses n^-1/2: those of exact minima, but for the logarithm.
    assert (law[0]["r_squared"] > 0.95).all()
    ((_, rows),) = theory_view(law, of_images=True).bodies
    assert [float(row[2]) for row in rows] == pytest.approx(
        [
            law[0]["critical_count"].values[law[0]["weight_decay"].values == d].mean()
            for d in (0, 0.1)
        ],
        rel=1e-3,
    )
    figure = figures.theory_over_images(*law)
    assert "p = 0.5 ± " in figure.alt
    points = figure.axes[0].lines[1]
    # The bins of factor 2: 3, 6, 9 and 40, 50, 60.
    assert points.get_xdata().tolist() == pytest.approx([3, 6, 9, (1600 + 2500 + 3600) / 150])
    common = (np.sqrt(40) + np.sqrt(50) + np.sqrt(60)) / 150
    expected = [0.1 / np.sqrt(3), 0.1 / np.sqrt(6), 0.1 / 3, 0.1 * common]
    np.testing.assert_allclose(points.get_ydata(), expected)


def test_the_page_has_both(both: Collection) -> None:
    page = render(both)
    assert "The rarest tokens paid" in page
    assert "In images: " in page
    assert 'id="table-falls"' in page
    assert 'id="figure-9"' in page
    assert 'id="theory-over-images"' in page
    assert 'id="table-image-theory"' in page
    assert 'id="table-image-excess"' in page
    assert "--image-wd1:" in page
