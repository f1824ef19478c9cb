"""What is drawn of the training text."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from reports import figures
from reports.page import drawings
from reports.reading import Collection, collect
from reports.style import COMMON, RARE
from reports.tests.studies import make_run, zipf_counts


def test_figure_2_colours_by_the_99th_percentile(collection: Collection) -> None:
    group = collection.groups[0]
    labels, counts = group["label"].values, group["class_count"].values
    threshold = np.percentile(counts[counts > 0], 99)
    tokens = [str(label) for label in labels[[0, 1, 8, 40, 200]]]
    figure = figures.figure_2(group, tokens)
    expected = [RARE if count < threshold else COMMON for count in counts[[0, 1, 8, 40, 200]]]
    assert [text.get_color() for text in figure.texts] == expected
    assert set(expected) == {RARE, COMMON}
    figure.savefig(io.BytesIO(), format="svg")
    with pytest.raises(ValueError, match="'absent' is not in the vocabulary"):
        figures.figure_2(group, ["absent"])


def test_figure_3a_ends_at_the_whole_text(collection: Collection) -> None:
    line = figures.figure_3a(collection.groups[0]).axes[0].lines[0]
    assert line.get_xdata()[-1] == pytest.approx(100)
    assert line.get_ydata()[-1] == pytest.approx(100)


def test_figure_3b_is_the_share_outside_95_percent(tmp_path: Path) -> None:
    for vocab_size in (100, 400):
        make_run(tmp_path, weight_decay=0.0, seed=0, vocab_size=vocab_size)
    groups = collect([tmp_path]).groups
    assert figures.figure_3b in [draw for draw, _ in drawings(groups)]
    (line,) = figures.figure_3b(*groups).axes[0].lines
    assert line.get_xdata().tolist() == [100, 400]
    for share, vocab_size in zip(line.get_ydata(), (100, 400), strict=True):
        counts = np.sort(zipf_counts(vocab_size))[::-1]
        needed = int(np.argmax(np.cumsum(counts) >= 0.95 * counts.sum())) + 1
        assert share == pytest.approx(100 * (1 - needed / vocab_size))


def test_figure_8_bars_are_the_bin_sizes(collection: Collection) -> None:
    group = collection.groups[0]
    bars = figures.figure_8(group).axes[0].patches
    assert [bar.get_height() for bar in bars] == group["bin_size"].values.tolist()
    assert [bar.get_x() for bar in bars] == group["bin_low"].values.tolist()
