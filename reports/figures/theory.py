"""The law of the excess loss over what was measured, and the fitted critical count."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from reports.excess import (
    PREDICTIONS,
    decays_with_excess,
    fitted_law,
    law_lines,
    predicted_decays,
    why_no_excess,
)
from reports.figures.panels import apart, caption, decay_panels, ends, grid, styled, titled_panels
from reports.groups import over_seeds, weight_decays
from reports.style import (
    INK,
    MUTED,
    RARE,
    ReportFigure,
    count_axis,
    decay_colours,
    note,
    plain_number,
)

MARKS = (
    "Squares: the floor, the loss at weight decay 0. Points: the excess, what weight decay λ adds "
    "to it, with its 95 % interval over seeds where there are several. Line: the law "
    "excess = A·(1 + n/n_0)^−p."
)


def theory_over_images(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """`theory_over_losses` of the images on a page about text."""
    return theory_over_losses(*groups, narrow=narrow)


@styled
def theory_over_losses(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Floor, excess and the fitted law against count: a panel for each decay that has an excess.

    A group that has none takes one panel, which says why.
    """
    decays = [decays_with_excess(group) for group in groups]
    columns = 2 if narrow else min(max(len(of_group) for of_group in decays) or 1, 6)
    rows = [-(-max(len(of_group), 1) // columns) for of_group in decays]
    size = (3.6 if narrow else max(2.3 * columns, 4.6), 2.3 * sum(rows))
    figure, axes = grid(sum(rows), columns, size)
    figure.name, figure.title = "Theory", "What decay adds to each count's loss, and its law"
    colours = decay_colours(weight_decays(groups))
    cells = [(g, decay) for g, found in zip(groups, decays, strict=True) for decay in found]
    excess_axes(axes[0], groups, cells)
    place, said = 0, []
    for group, taken, found in zip(groups, rows, decays, strict=True):
        for position, decay in enumerate(found or [None]):
            axis = axes[place + position]
            colour = INK if decay is None else colours[decay]
            said.append(excess_panel(axis, group, decay, colour))
            first = position % columns == 0
            axis.tick_params(labelleft=first)
            if first:
                axis.set_ylabel("loss (nats)")
                lines = [group.attrs["name"], axis.get_title("left").strip()]
                axis.set_title("\n".join(filter(None, lines)), fontsize=8.5)
        for axis in axes[place + max(len(found), 1) : place + taken * columns]:
            axis.remove()
        place += taken * columns
    figure.caption = caption(
        f"{MARKS} The excess is no straight line in the count: beyond n_0 it falls as a power of "
        "it, −p, and below n_0 all pay nearly alike. A, n_0 and p are fitted to the log of the "
        "mean excess in bins of factor 2, ± standard errors; R² is over these bins. Floor and "
        "excess are means over pairs of runs of one seed.",
        groups,
    )
    figure.alt = "Floor and excess against count with the fitted law. " + "; ".join(said)
    return figure


def excess_axes(
    axis: Axes, groups: Sequence[xr.Dataset], cells: Sequence[tuple[xr.Dataset, float]]
) -> None:
    """Logarithmic axes for the panels of these cells, with room for the text of `excess_panel`."""
    count_axis(axis, max(float(group["class_count"].values.max()) for group in groups))
    values = [
        group[name].sel(decayed=decay).values
        for group, decay in cells
        for name in ("floor", "excess")
    ]
    drawn = np.concatenate([*values, [0.1]])
    drawn = drawn[drawn > 0]
    _log_axis(axis, max(drawn.min() / 2, drawn.max() * 1e-5), 60 * drawn.max())


def _log_axis(axis: Axes, low: float, high: float) -> None:
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(plain_number))


def excess_panel(axis: Axes, group: xr.Dataset, decay: float | None, colour: str) -> str:
    """Floor, excess and law at a decay, or why there is no excess; returns the numbers in words."""
    style: dict[str, Any] = {
        "ha": "right",
        "va": "top",
        "transform": axis.transAxes,
        "fontsize": 7.5,
    }
    axis.tick_params(labelbottom=True)
    axis.set_xlabel("count", fontsize=8.5)
    if decay is None or decay not in decays_with_excess(group):
        reason = why_no_excess(group) or str(group["excess_note"].sel(decayed=decay).item())
        axis.text(0.97, 0.97, textwrap.fill(f"No excess: {reason}", 30), **style)
        return f"{group.attrs['name']}: {reason}"
    cell = group.sel(decayed=decay)
    counts, excess = cell["octave_count"].values, cell["excess"].values
    positive = excess > 0
    floor = cell["floor"].where(cell["floor"] > 0)
    axis.plot(counts, floor.values, "s", fillstyle="none", color=MUTED, markersize=3)
    half = np.nan_to_num(cell["excess_half_width"].values)
    low = np.minimum(half, excess * (1 - 1e-3))  # an interval down to 0 ends below the axis
    axis.errorbar(
        *(counts[positive], excess[positive]),
        yerr=[low[positive], half[positive]],
        fmt="o", color=colour, markersize=4, elinewidth=0.9,
    )  # fmt: skip
    axis.set_title(f"λ = {decay:g}", fontsize=8.5)
    if reason := str(cell["excess_note"].item()):
        axis.text(0.97, 0.97, textwrap.fill(f"No law: {reason}", 30), **style)
        return f"{group.attrs['name']} at weight decay {decay:g}: {reason}"
    law, errors = fitted_law(group, decay)
    along = np.geomspace(np.nanmin(counts), group["class_count"].values.max(), 200)
    fall = law["exponent"] * np.log1p(along / law["saturation_count"])
    curve = np.exp(np.log(law["amplitude"]) - fall)  # a limit of the law may have a huge A
    axis.plot(along, curve, color=INK, linewidth=1.3)
    said = law_lines(law, errors)
    lines = [*said, f"R² = {law['r_squared']:.3f}"]
    if unseen := int((excess <= 0).sum()):
        lines.append(f"{unseen} bins ≤ 0 not drawn")
    axis.text(0.97, 0.97, "\n".join(lines), **style)
    return (
        f"{group.attrs['name']} at weight decay {decay:g}: {', '.join(said)}, "
        f"R squared {law['r_squared']:.3f}"
    )


@styled
def predictions(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Losses by count as the margin law predicts them from a small decay, and as measured."""
    figure, axes = titled_panels(groups, narrow, height=3.3)
    figure.name, figure.title = "Theory", "Predicted from the smallest decay, and measured"
    colours = decay_colours(weight_decays(groups))
    values = [group[name].values.ravel() for group in groups for name in PREDICTIONS]
    drawn = np.concatenate([*values, [0.1]])
    drawn = drawn[drawn > 0]
    count_axis(axes[0], max(float(group["class_count"].values.max()) for group in groups))
    _log_axis(axes[0], drawn.min() / 1.5, 3 * drawn.max())
    axes[0].set_ylabel("loss (nats)")
    said = []
    for axis, group in zip(axes, groups, strict=True):
        for decay in predicted_decays(group):
            cell = group.sel(decayed=decay)
            counts, colour = cell["octave_count"].values, colours[decay]
            axis.plot(counts, cell["measured"].values, "o", color=colour, markersize=4)
            axis.plot(counts, cell["second_order"].values, color=colour, label=f"λ = {decay:g}")
            off = cell["second_order"].values / cell["measured"].values - 1
            said.append(
                f"{group.attrs['name']} at weight decay {decay:g}: off by at most "
                f"{100 * np.nanmax(abs(off)):.0f} % in a bin"
            )
        axis.set_xlabel("count")
        if not predicted_decays(group):
            axis.text(0.97, 0.97, "No prediction", ha="right", va="top", transform=axis.transAxes)
            continue
        axis.legend(
            title=f"from λ = {float(group['predicted_from']):g}",
            **{"fontsize": 7.5, "title_fontsize": 7.5, "loc": "upper right", "frameon": False},
        )
    figure.caption = caption(
        "Points: mean loss of the tokens in bins of factor 2. Lines: the margin law of second "
        "order, from the runs at decay 0 and at the smallest decay of the same seeds. Nothing is "
        "fitted to the runs that are predicted.",
        groups,
    )
    figure.alt = "Predicted and measured loss against count. " + "; ".join(said)
    return figure


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
