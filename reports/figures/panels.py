"""What the figures share: style, panels on shared axes, lines with their bands, keys, captions."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import ParamSpec

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from reports.groups import describe, seed_mean
from reports.style import CLOUD, STYLE, ReportFigure, decay_colours, label_ends, plain_number
from reports.wording import worded

P = ParamSpec("P")
Draw = Callable[P, ReportFigure]
Lines = Sequence[tuple[xr.Dataset, str, str]]
"""Of a panel: the band, label and colour of each."""


def styled(draw: Draw[P]) -> Draw[P]:
    """Draw under the report's style without touching matplotlib's global settings."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> ReportFigure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        _reword(figure, [arg for arg in args if isinstance(arg, xr.Dataset)])
        return figure

    return inside


def _reword(figure: ReportFigure, groups: Sequence[xr.Dataset]) -> None:
    figure.title, figure.alt = worded(figure.title, groups), worded(figure.alt, groups)
    for axis in figure.axes:
        for text in (axis.xaxis.label, axis.yaxis.label, *axis.texts):
            text.set_text(worded(text.get_text(), groups))


def titled_panels(
    groups: Sequence[xr.Dataset], narrow: bool, height: float = 2.9, *, sharex: bool = True
) -> tuple[ReportFigure, list[Axes]]:
    """One titled panel a group: up to two side by side, one under the other where narrow."""
    if not groups:
        raise ValueError("no groups of runs to draw; expected at least one")
    columns = 1 if narrow else min(len(groups), 2)
    rows = -(-len(groups) // columns)
    width = 3.6 if narrow else 4.6 * columns
    size = (width, (height - 0.2 * narrow) * rows)
    figure, axes = grid(rows, columns, size, sharex=sharex)
    for axis in axes[len(groups) :]:
        axis.remove()
    for axis, group in zip(axes, groups, strict=False):
        axis.set_title(textwrap.fill(group.attrs["name"], 40 if narrow else 52))
        axis.tick_params(labelbottom=True)
    return figure, axes[: len(groups)]


def grid(
    rows: int, columns: int, size: tuple[float, float], *, sharex: bool = True
) -> tuple[ReportFigure, list[Axes]]:
    """A figure of so many inches and its panels, row by row, on shared axes."""
    figure = ReportFigure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=sharex, sharey=True, squeeze=False)
    return figure, list(axes.flat)


def decay_panels(axes: Sequence[Axes], panels: Sequence[Lines]) -> None:
    """Means and seed bands against weight decay: a panel's lines are (band, label, colour)."""
    tops = []
    for axis, lines in zip(axes, panels, strict=True):
        decays = lines[0][0]["weight_decay"].values
        for band, _, colour in lines:
            draw_band(axis, decays, band, colour)
            tops.append((band["mean"] + band["half_width"].fillna(0)).max())
        axis.set_xticks(apart(decays))
        axis.xaxis.set_major_formatter(plain_number)
        axis.set_xlabel("weight decay λ")
    axes[0].set_ylim(0, 1.08 * float(max(tops)) or 1.0)  # shared, so after all are drawn
    for axis, lines in zip(axes, panels, strict=True):
        ends = [
            (float(band["weight_decay"][-1]), float(band["mean"][-1]), label, colour)
            for band, label, colour in lines
        ]
        label_ends(axis, ends)


def apart(places: np.ndarray, least: float = 0.04) -> list[float]:
    """The places that are far enough (of their whole span) from the one before to be named."""
    kept = [float(places[0])]
    for place in places[1:]:
        if place - kept[-1] > least * (places[-1] - places[0]):
            kept.append(float(place))
    return kept


def bin_middles(group: xr.Dataset) -> np.ndarray:
    """(bin): the geometric middle of the counts that fall into a bin."""
    low, high = group["bin_low"].values, group["bin_high"].values
    return np.sqrt(low * np.maximum(high - 1, low).astype(np.float64))


def draw_band(axis: Axes, x: np.ndarray, band: xr.Dataset, colour: str) -> None:
    """A line of means with its seed band, where there is a mean."""
    drawn = np.isfinite(band["mean"].values)
    mean, half = band["mean"].values[drawn], band["half_width"].values[drawn]
    shade = {"color": colour, "alpha": 0.18, "linewidth": 0}
    axis.fill_between(x[drawn], mean - half, mean + half, **shade)
    axis.plot(x[drawn], mean, "o-", color=colour)


def cloud(axis: Axes, x: np.ndarray, y: np.ndarray, *, size: float, alpha: float) -> None:
    """Grey points, one a class: rasterised, for a vocabulary has tens of thousands."""
    axis.scatter(x, y, s=size, color=CLOUD, alpha=alpha, linewidths=0, rasterized=True)


def decay_key(figure: ReportFigure, decays: Sequence[float]) -> None:
    """The colours of the weight decays, above the panels."""
    colours = decay_colours(decays)
    handles = [
        matplotlib.lines.Line2D([], [], color=colours[decay], marker="o", label=f"{decay:g}")
        for decay in decays
    ]
    style = {"fontsize": 8.5, "title_fontsize": 8.5, "handlelength": 1.4, "columnspacing": 1.2}
    style |= {"alignment": "left", "borderpad": 0, "ncols": min(len(decays), 7)}
    figure.legend(handles=handles, loc="outside upper left", title="weight decay λ", **style)


def highest_loss(group: xr.Dataset, decay: float) -> float:
    """The largest mean over seeds of a class's loss at a weight decay, in nats."""
    return float(np.nanmax(seed_mean(group, "loss", decay)))


def highest_bin(groups: Sequence[xr.Dataset]) -> float:
    """The largest loss of a frequency bin in any run, in nats."""
    return max(float(np.nanmax(group["bin_loss"].values)) for group in groups)


def ends(mean: xr.DataArray, unit: str = " nats") -> str:
    """ "0.10 nats at weight decay 0 to 1.2 nats at weight decay 1"."""
    decays = mean["weight_decay"].values
    first = f"{float(mean[0]):.3g}{unit} at weight decay {decays[0]:g}"
    if len(decays) == 1:
        return first
    return f"{first} to {float(mean[-1]):.3g}{unit} at weight decay {decays[-1]:g}"


def caption(text: str, groups: Sequence[xr.Dataset], *, runs: bool = True) -> str:
    """The text, then what was run; groups that were run alike are named together."""
    names: dict[str, list[str]] = {}
    for group in groups:
        names.setdefault(describe(group, seeds_too=runs), []).append(group.attrs["name"])
    said = [f"{' and '.join(who)} on {how}" if runs else how for how, who in names.items()]
    text = worded(text, groups)
    return f"{text} {'Runs' if runs else 'Corpus'}: {'; '.join(said)}."
