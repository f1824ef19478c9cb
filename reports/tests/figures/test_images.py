"""Test accuracy by class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reports import figures
from reports.page import drawings, inline_svg
from reports.reading import collect
from reports.tests.studies import make_run
from run_store import class_record, publish


def test_figure_9_shows_the_last_test_accuracy(tmp_path: Path) -> None:
    counts = np.array([50, 10, 400])
    for seed in (0, 1):
        run = make_run(tmp_path, weight_decay=0.1, seed=seed, status="running", model="resnet9")
        window = np.ones((2, 3), dtype=int)
        final = {"final_count": counts, "final_loss": [1.0, 2.0, 0.5]}
        tested = np.array([[0.1, 0.1, 0.1], [0.6, 0.2 + 0.1 * seed, 0.9]])
        data = class_record(
            steps=[1, 2], class_counts=counts, labels=["ship", "<b>", "猫"], count=window,
            loss=window * 1.0, accuracy=window * 0.5, final_accuracy=[0.5, 0.4, 0.9],
            test_count=window, test_accuracy=tested, **final,
        )  # fmt: skip
        publish(run, data)
    groups = collect([tmp_path]).groups
    assert drawings(groups)[0][0] is figures.figure_9
    figure = figures.figure_9(*groups)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [25.0, 60.0, 90.0])
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == ["<b> (10)", "ship (50)", "猫 (400)"]
    assert "猫" in inline_svg(figure, "nine", [0.1])
