"""Paradox, theory and repair beside each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reports import figures
from reports.page import drawings
from reports.reading import collect
from reports.tests.studies import make_run


def test_glance_sets_damage_law_and_repair_side_by_side(tmp_path: Path) -> None:
    for weight_decay, exponent in ((0.0, 0), (0.5, 0), (0.5, 0.25), (1.0, 0)):
        make_run(
            tmp_path, weight_decay=weight_decay, seed=0, critical_count=0.1 + 2 * weight_decay,
            loss_weight_exponent=exponent,
        )  # fmt: skip
    groups = collect([tmp_path]).groups
    draw, shown = drawings(groups)[0]
    assert draw is figures.glance
    paradox, theory, repair = draw(*shown, narrow=True).axes
    plain, weighted = shown
    assert plain.attrs["name"] == "openelm-tiny"
    for line, name in zip(paradox.lines, ("token_balanced_loss", "average_loss"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), plain[name].values)
    # The law at 1, the strongest with a run at decay 0; repair at 0.5, which both have.
    assert theory.get_title("left") == "Theory, λ = 1"
    floor, excess, law = theory.lines
    strongest = plain.sel(decayed=1.0)
    np.testing.assert_allclose(floor.get_ydata(), strongest["floor"].values)
    np.testing.assert_allclose(excess.get_ydata(), strongest["excess"].values)
    amplitude, saturation_count, exponent, _ = strongest["law"].values
    drawn = amplitude / (1 + law.get_xdata() / saturation_count) ** exponent
    np.testing.assert_allclose(law.get_ydata(), drawn, rtol=1e-9)
    for line, loss in zip(
        repair.lines, (plain["bin_loss"][1], weighted["bin_loss"][0]), strict=True
    ):
        np.testing.assert_allclose(line.get_ydata(), loss.values[np.isfinite(loss.values)])
