"""Figures draw the data they are given, whatever of it there is."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reports import figures
from reports.page import CORPUS_FIGURES, FIGURES
from reports.reading import Collection, collect
from reports.style import ReportFigure
from reports.tests.studies import make_run

EVERY = (*FIGURES, *CORPUS_FIGURES)


@pytest.mark.parametrize("draw", EVERY, ids=lambda draw: draw.__name__)
def test_every_figure_says_what_was_run(
    draw: Callable[..., ReportFigure], collection: Collection
) -> None:
    figure = draw(*collection.groups)
    figure.savefig(io.BytesIO(), format="pdf")
    assert figure.name
    assert figure.title
    assert figure.alt
    assert "python-docs" in figure.caption
    assert "V = 300" in figure.caption
    if draw not in CORPUS_FIGURES:
        assert "openelm-tiny and qwen2-tiny on" in figure.caption
        assert "2,000 steps" in figure.caption
        assert "seeds 0, 1 (n = 2 per weight decay)" in figure.caption


@pytest.mark.parametrize("draw", EVERY, ids=lambda draw: draw.__name__)
def test_a_single_run_is_drawn(draw: Callable[..., ReportFigure], tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.5, seed=3, steps=1, corpus="$a_b$ <i>")
    (group,) = collect([tmp_path]).groups
    figure = draw(group, narrow=True)
    figure.savefig(io.BytesIO(), format="svg")
    assert "$a_b$" in figure.caption


@pytest.mark.parametrize("draw", [figures.figure_1, figures.figure_4, figures.critical_count])
def test_shared_axes_hold_every_panel(draw: Callable[..., ReportFigure], tmp_path: Path) -> None:
    for model, critical_count in (("a", 0.1), ("b", 20.0), ("c", 1.0)):
        for weight_decay in (0.0, 5e-4, 1.0):
            make_run(
                tmp_path, weight_decay=weight_decay, seed=0, model=model,
                critical_count=critical_count,
            )  # fmt: skip
    figure = draw(*collect([tmp_path]).groups)
    for axis in figure.axes:
        low, high = axis.get_ylim()
        assert low == 0
        assert all((line.get_ydata() <= high).all() for line in axis.lines)
        assert axis.get_xticks().tolist() == [0.0, 1.0]


def test_no_global_state_is_used() -> None:
    """pyplot is never imported, so a figure lives and dies with its last reference."""
    code = "import sys, reports.page; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
