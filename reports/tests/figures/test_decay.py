"""Losses against weight decay, and with repair."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reports import figures
from reports.page import drawings
from reports.reading import Collection, collect
from reports.style import COMMON, RARE
from reports.tests.studies import make_run


def test_figure_1_draws_the_end_bins(collection: Collection) -> None:
    group = collection.groups[0]
    rare, common = figures.figure_1(group).axes[0].lines
    held = np.flatnonzero(group["bin_size"].values)
    for line, place in ((rare, held[0]), (common, held[-1])):
        means = group["bin_loss"][:, place].groupby("weight_decay").mean()
        np.testing.assert_allclose(line.get_ydata(), means.values)


def test_figure_4_draws_both_losses(collection: Collection) -> None:
    group = collection.groups[0]
    balanced, average = figures.figure_4(group).axes[0].lines
    assert (balanced.get_color(), average.get_color()) == (RARE, COMMON)
    for line, name in ((balanced, "token_balanced_loss"), (average, "average_loss")):
        means = group[name].groupby("weight_decay").mean()
        np.testing.assert_allclose(line.get_xdata(), means["weight_decay"].values)
        np.testing.assert_allclose(line.get_ydata(), means.values)


def test_repairs_are_drawn_where_two_share_a_weight_decay(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.0, seed=0)
    make_run(tmp_path, weight_decay=1.0, seed=0, loss_weight_exponent=0.25)
    assert figures.repair not in dict(drawings(collect([tmp_path]).groups))
    make_run(tmp_path, weight_decay=1.0, seed=0, loss_weight_exponent=0.5)
    shown = dict(drawings(collect([tmp_path]).groups))[figures.repair]
    (axis,) = figures.repair(*shown).axes
    assert axis.get_title("left") == f"{shown[0].attrs['name']}, weight decay 1"
    assert [str(line.get_label())[:8] for line in axis.lines] == ["g = 0.25", "g = 0.5:"]
