"""Frequency bins by weight decay."""

from __future__ import annotations

from reports import figures
from reports.reading import Collection
from reports.style import decay_colours


def test_figure_7a_has_one_line_a_weight_decay(collection: Collection) -> None:
    axis = figures.figure_7a(collection.groups[0]).axes[0]
    assert axis.get_xscale() == "log"
    assert axis.get_yscale() == "symlog"
    assert len(axis.lines) == 3
    colours = decay_colours([0.0, 0.3, 1.0])
    assert [line.get_color() for line in axis.lines] == list(colours.values())
