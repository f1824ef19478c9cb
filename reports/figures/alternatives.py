"""Settings beside each other at every average loss; and what decay does to text that is new."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from frequency_bins import seed_band
from reports.alternatives import Comparison, Curve, compared
from reports.figures.panels import bin_middles, caption, styled, titled_panels
from reports.style import COMMON, INK, MUTED, RARE, ReportFigure, count_axis, decay_colours
from reports.tasks import rises

_DASHES = {"regulariser": (0, (4, 1.5)), "optimizer": "-", "repair": (0, (1, 1.2)), "tuning": "-."}
_MARKS = "osD^v<>PXphd*"


@styled
def alternatives(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Token-balanced against average loss, a curve a setting, a panel a model."""
    found = compared(groups)
    shown = [comparison.group for comparison in found]
    figure, axes = titled_panels(shown, narrow, height=5.4 if narrow else 4.2, sharex=False)
    for axis, comparison in zip(axes, found, strict=True):
        _panel(axis, comparison)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
        axis.legend(fontsize=7, ncols=2, columnspacing=1, handlelength=3.2, **place)
    axes[0].set_ylim(_range(found, "balanced"))  # shared by all
    axes[0].set_ylabel("token-balanced loss (nats)")
    figure.name = "Alternatives"
    figure.title = "What each setting costs the rare tokens at each average loss"
    figure.caption = caption(
        "Mean over seeds, weaker settings first; bars are 95 % intervals of the token-balanced "
        "loss. A curve below another costs the rare tokens less at the same average loss. The "
        "line marks the average at which settings are compared. Curves that leave the range of "
        "weight decay are cut. Dashed: regularisers; solid: optimizers; dotted: repairs.",
        shown,
    )
    said = (f"{c.name}: {', '.join(map(_ends, (c.reference, *c.curves)))}" for c in found)
    figure.alt = "Token-balanced against average loss. " + "; ".join(said)
    return figure


def _panel(axis: Axes, comparison: Comparison) -> None:
    curves = comparison.curves
    colours = decay_colours([float(place) for place in range(len(curves))]).values()
    at = float(np.nanmean(comparison.reference.average[:, comparison.place]))
    axis.axvline(at, color=MUTED, linewidth=0.8)
    plain = comparison.reference
    _line(axis, plain, INK, "o", "-", linewidth=2.4, zorder=1.9)
    for place, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
        _line(axis, curve, colour, _MARKS[place % len(_MARKS)], _DASHES[curve.kind])
    axis.set_xlabel("average loss (nats)")
    axis.set_xlim(_range([comparison], "average"))


def _range(found: Sequence[Comparison], name: str) -> tuple[float, float]:
    """From the least value of any curve to the largest of a reference, and a little beyond."""
    most = max(float(np.nanmax(getattr(c.reference, name))) for c in found)
    curves = (curve for c in found for curve in (c.reference, *c.curves))
    least = min(float(np.nanmin(getattr(curve, name))) for curve in curves)
    return least - 0.05 * (most - least), most + 0.15 * (most - least)


def _line(axis: Axes, curve: Curve, colour: str, mark: str, dashes: object, **more: float) -> None:
    """Means of the points that any seed has."""
    known = np.isfinite(curve.average) & np.isfinite(curve.balanced)
    points = [
        (seed_band(curve.average[own, p]), seed_band(curve.balanced[own, p]))
        for p in range(known.shape[1])
        if (own := known[:, p]).any()
    ]
    x, y, half = (
        [float(value) for value in values]
        for values in zip(*((a.mean, b.mean, b.half_width) for a, b in points), strict=True)
    )
    style = {"color": colour, "linestyle": dashes, "marker": mark, "label": curve.name}
    style |= {"elinewidth": 0.6, "markersize": 4, "linewidth": 1.3}
    # A single seed has no bar, and matplotlib none for NaN.
    axis.errorbar(x, y, yerr=half, **(style | more))


def _ends(curve: Curve) -> str:
    first, last = (
        f"{np.nanmean(curve.balanced[:, p]):.3g} at {np.nanmean(curve.average[:, p]):.3g}"
        for p in (0, -1)
    )
    return f"{curve.name} {first} to {last} nats"


@styled
def new_text(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """By how much weight decay raised the loss of each bin, on training and on held-out text."""
    found = [(c.group, c.span) for c in compared(groups)]
    found = [(group, span) for group, span in found if rises(group, *span) is not None]
    shown = [group for group, _ in found]
    figure, axes = titled_panels(shown, narrow)
    said = []
    for axis, (group, span) in zip(axes, found, strict=True):
        apart = rises(group, *span)
        assert apart is not None
        middles = bin_middles(group)
        axis.axhline(0, color=MUTED, linewidth=0.8)
        for text, (name, colour) in enumerate((("training text", RARE), ("held-out text", COMMON))):
            band = seed_band(apart[:, text])
            drawn = np.isfinite(band.mean)
            x, mean, half = middles[drawn], band.mean[drawn], band.half_width[drawn]
            shade = {"color": colour, "alpha": 0.18, "linewidth": 0}
            axis.fill_between(x, mean - half, mean + half, **shade)
            axis.plot(x, mean, "o-", color=colour, label=name)
            said.append(f"{name} {mean[0]:+.2f} (rarest) to {mean[-1]:+.2f} nats")
        count_axis(axis, float(group["bin_high"].values.max()))
        axis.set_title(f"{group.attrs['name']}, weight decay {span[1]:g}")
        axis.set_xlabel("times seen in training")
    axes[0].set_ylabel("rise of the loss (nats)")
    axes[0].legend(fontsize=8)
    figure.name, figure.title = "New text", "What decay undoes of memorising, and what of learning"
    figure.caption = caption(
        "Loss less that at the smallest weight decay and the same seed, mean over the tokens of "
        "each frequency bin: of the text that was trained on, and of reviews that were not. Bands "
        "are 95 % intervals over seeds.",
        shown,
    )
    figure.alt = "Rise of the loss by frequency. " + "; ".join(said)
    return figure
