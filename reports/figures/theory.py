"""The corrected law beside what was measured, and the critical count that was fitted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from reports.figures.panels import (
    apart,
    bin_middles,
    caption,
    cloud,
    decay_panels,
    ends,
    grid,
    highest_loss,
    styled,
    titled_panels,
)
from reports.groups import (
    MOST_NAMED_CLASSES,
    effective_counts,
    loss_weight_exponent,
    over_seeds,
    seed_mean,
    weight_decays,
)
from reports.style import INK, RARE, ReportFigure, count_axis, decay_colours, loss_axis, note
from reports.tables import law_loss


def theory_over_images(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """`theory_over_losses` of the images on a page about text."""
    return theory_over_losses(*groups, narrow=narrow)


@styled
def theory_over_losses(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Measured loss against count with the corrected law at its fitted n_c, a panel a decay."""
    cells = [(group, decay) for group in groups for decay in weight_decays([group])]
    most = max(len(weight_decays([group])) for group in groups)
    columns = 2 if narrow else min(most, 6)
    rows = [-(-len(weight_decays([group])) // columns) for group in groups]
    size = (3.6 if narrow else max(2.0 * columns, 4.6), 2.0 * sum(rows))
    figure, axes = grid(sum(rows), columns, size)
    figure.name, figure.title = "Theory", "One fitted number, n_c, against every token's loss"
    colours = decay_colours(weight_decays(groups))
    law_axes(axes[0], groups, max(highest_loss(*cell) for cell in cells))  # which all panels share
    place, said = 0, []
    for group, taken in zip(groups, rows, strict=True):
        for position, decay in enumerate(weight_decays([group])):
            axis = axes[place + position]
            said.append(law_panel(axis, group, decay, colours[decay]))
            first = position % columns == 0
            axis.tick_params(labelleft=first)
            if first:
                axis.set_ylabel("loss (nats)")
                axis.set_title(
                    f"{group.attrs['name']}\n{axis.get_title('left').strip()}", fontsize=8.5
                )
        place += taken * columns
    for axis in axes:
        if not axis.has_data():
            axis.remove()
    figure.caption = caption(
        f"{marks(groups)} Line: the corrected law "
        "loss = −log(1 − (1 − 1/V)·√(n_c/n)), flat at log V for n ≤ n_c, with the critical count "
        "n_c fitted to all tokens of a run, each weighed by its count, since the mean of n losses "
        "varies as 1/n; R² is over the tokens, so weighed, in 1 − exp(−loss). The law is that of "
        "exact minima under L2 decay with free features; to a trained network it is a fit.",
        groups,
    )
    figure.alt = "Loss against count with the fitted law. " + "; ".join(said)
    assert len(said) == len(cells)
    return figure


def law_axes(axis: Axes, groups: Sequence[xr.Dataset], highest: float) -> None:
    """Axes of counts and of losses up to `highest`, with room for the text of `law_panel`."""
    count_axis(axis, max(float(group["class_count"].values.max()) for group in groups))
    few = any(group.sizes["class"] <= MOST_NAMED_CLASSES for group in groups)
    loss_axis(axis, 10 * highest if few else highest)  # few may all be high, where the text is


def law_panel(axis: Axes, group: xr.Dataset, decay: float, colour: str) -> str:
    """Measured losses and the law at its fitted n_c; returns n_c and R² in words."""
    counts, values = group["class_count"].values, seed_mean(group, "loss", decay)
    drawn = (counts > 0) & np.isfinite(values)
    points = counts[drawn], values[drawn]
    if len(counts) > MOST_NAMED_CLASSES:
        cloud(axis, *points, size=3, alpha=0.25)
        points = bin_middles(group), seed_mean(group, "bin_loss", decay)
    axis.plot(*points, "o", color=colour, markersize=4)
    fitted, r_squared = (
        float(seed_mean(group, name, decay)) for name in ("critical_count", "r_squared")
    )
    along = np.geomspace(1, counts.max(), 200)
    effective = effective_counts(along, counts, loss_weight_exponent(group.attrs["config"]))
    curve = law_loss(effective, fitted, vocab_size=len(counts))
    axis.plot(along, curve, color=INK, linewidth=1.3)
    axis.set_title(f"\nλ = {decay:g}", fontsize=8.5)
    shown = f"n_c = {_rounded(fitted)}\nR² = {r_squared:.2f}"
    axis.text(0.97, 0.97, shown, ha="right", va="top", transform=axis.transAxes, fontsize=8.5)
    axis.tick_params(labelbottom=True)
    axis.set_xlabel("count", fontsize=8.5)
    return (
        f"{group.attrs['name']} at weight decay {decay:g}: n_c {_rounded(fitted)}, "
        f"R squared {r_squared:.2f}"
    )


def marks(groups: Sequence[xr.Dataset]) -> str:
    """What the panels of `law_panel` show."""
    if all(group.sizes["class"] <= MOST_NAMED_CLASSES for group in groups):
        return "Points: every token."
    return "Grey: every token. Points: the mean of each frequency bin."


@styled
def critical_count(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Fitted critical count n_c against weight decay."""
    figure, axes = titled_panels(groups, narrow)
    figure.name, figure.title = "Theory", "The fitted critical count under weight decay"
    bands = [over_seeds(group, "critical_count") for group in groups]
    decay_panels(axes, [[(band, "", RARE)] for band in bands])
    said = []
    for axis, group, band in zip(axes, groups, bands, strict=True):
        for decay in apart(band["weight_decay"].values, 0.14):
            mean = float(band["mean"].sel(weight_decay=decay))
            note(axis, _rounded(mean), (decay, mean), (0, 6), ha="center")
        axis.margins(x=0.09)
        said.append(f"{group.attrs['name']}: {ends(band['mean'], unit='')}")
    axes[0].set_ylim(0, 1.1 * axes[0].get_ylim()[1])
    axes[0].set_ylabel("critical count n_c")
    figure.caption = caption(
        "The count at or below which the theory says a token is neglected altogether, fitted to "
        "each run's losses.",
        groups,
    )
    figure.alt = "Fitted critical count against weight decay. " + "; ".join(said)
    return figure


def _rounded(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
