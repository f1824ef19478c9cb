"""Every token, and every frequency bin: Figures 5, 6a, 6b, 7a and 7b."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from reports.figures.panels import (
    bin_middles,
    caption,
    cloud,
    decay_key,
    draw_band,
    highest_bin,
    highest_loss,
    styled,
    titled_panels,
)
from reports.groups import bin_range, end_bins, over_seeds, seed_mean, weight_decays
from reports.style import MUTED, RARE, ReportFigure, count_axis, decay_colours, loss_axis

POINTS = "One grey point a token, averaged over seeds; the mean of each frequency bin in colour."


@styled
def figure_5(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Learning speed of every token against its count at the largest weight decay (Figure 5)."""
    figure, axes = _by_token("Learning speed", "learning_speed", groups, narrow)
    figure.name, figure.title = "Figure 5", "How fast every token is learned"
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("learning speed S (0 to 1)")
    figure.caption = caption(
        "One grey point a token, the mean of each frequency bin in colour. S = 1 − AUC/T of the "
        "token's min–max normalised loss over training: 1 is learned at once.",
        groups,
    )
    return figure


@styled
def figure_6a(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Loss of every token against its count at the largest weight decay (Figure 6a)."""
    figure, axes = _by_token("Loss", "loss", groups, narrow)
    figure.name, figure.title = "Figure 6a", "The loss of every token"
    loss_axis(axes[0], max(highest_loss(group, max(weight_decays([group]))) for group in groups))
    axes[0].set_ylabel("loss (nats)")
    figure.caption = caption(POINTS, groups)
    return figure


@styled
def figure_6b(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Accuracy of every token against its count at the largest weight decay (Figure 6b)."""
    figure, axes = _by_token("Accuracy", "accuracy", groups, narrow, scale=100)
    figure.name, figure.title = "Figure 6b", "The accuracy of every token"
    axes[0].set_ylim(-3, 103)
    axes[0].set_ylabel("accuracy (%)")
    figure.caption = caption(POINTS, groups)
    return figure


def _by_token(
    what: str, name: str, groups: Sequence[xr.Dataset], narrow: bool, *, scale: float = 1.0
) -> tuple[ReportFigure, list[Axes]]:
    """Every class at the largest weight decay, mean over seeds, and the bins' means over it."""
    figure, axes = titled_panels(groups, narrow)
    said = []
    for axis, group in zip(axes, groups, strict=True):
        decay = max(weight_decays([group]))
        counts, values = group["class_count"].values, scale * seed_mean(group, name, decay)
        drawn = (counts > 0) & np.isfinite(values)
        cloud(axis, counts[drawn], values[drawn], size=5, alpha=0.3)
        means = scale * seed_mean(group, f"bin_{name}", decay)
        axis.plot(bin_middles(group), means, "o-", color=RARE)
        count_axis(axis, float(counts.max()))
        axis.set_title(f"{group.attrs['name']}, weight decay {decay:g}")
        said.append(_at_the_ends(group, f"bin_{name}", decay))
    figure.alt = f"{what} of every token against its count. " + "; ".join(said)
    return figure, axes


@styled
def figure_7a(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Loss by frequency bin, one line a weight decay (Figures 6a and 7a)."""
    shares = [group["bin_size"].values / group["bin_size"].values.sum() for group in groups]
    figure, axes = _by_bin("Loss", "bin_loss", groups, narrow, shares)
    figure.name, figure.title = "Figure 7a", "Loss by how often a token occurs"
    loss_axis(axes[0], 2.5 * highest_bin(groups))
    axes[0].set_ylabel("loss (nats)")
    figure.caption = caption(
        "Mean cross-entropy of the tokens in each frequency bin (powers of 3 of the training "
        "count). Grey numbers: share of the vocabulary that occurs in each bin, in %.",
        groups,
    )
    return figure


@styled
def figure_7b(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Learning speed by frequency bin, one line a weight decay (Figures 5 and 7b)."""
    shares = [group["bin_windows_seen"].values.mean(axis=0) for group in groups]
    figure, axes = _by_bin("Learning speed", "bin_learning_speed", groups, narrow, shares)
    figure.name, figure.title = "Figure 7b", "Learning speed by how often a token occurs"
    axes[0].set_ylim(0, 1.08)
    axes[0].set_ylabel("learning speed S (0 to 1)")
    figure.caption = caption(
        "S = 1 − AUC/T of each token's min–max normalised loss over training, averaged over the "
        "tokens of a bin: 1 is learned at once, 0 never. Grey numbers: share of the windows of "
        "training that saw a token of the bin, in %; in the others its loss is the last one seen.",
        groups,
    )
    return figure


def _by_bin(
    what: str,
    name: str,
    groups: Sequence[xr.Dataset],
    narrow: bool,
    shares: Sequence[np.ndarray],
) -> tuple[ReportFigure, list[Axes]]:
    """A line a weight decay through the bins, and a share of each bin's along the top."""
    figure, axes = titled_panels(groups, narrow, height=3.2)
    colours = decay_colours(weight_decays(groups))
    said = []
    for axis, group, of_bins in zip(axes, groups, shares, strict=True):
        band = over_seeds(group, name)
        decays = band["weight_decay"].values
        for decay in decays:
            at = band.sel(weight_decay=decay)
            draw_band(axis, bin_middles(group), at, colours[float(decay)])
        count_axis(axis, float(group["bin_high"].values.max()))
        _bin_shares(axis, group, of_bins)
        said += [_at_the_ends(group, name, decay) for decay in {decays[0], decays[-1]}]
    decay_key(figure, weight_decays(groups))
    figure.alt = f"{what} by frequency bin. " + "; ".join(said)
    return figure, axes


def _bin_shares(axis: Axes, group: xr.Dataset, shares: np.ndarray) -> None:
    """A share for each bin that holds classes, in %, along the top of the panel."""
    held = group["bin_size"].values > 0
    for middle, share in zip(bin_middles(group)[held], 100 * shares[held], strict=True):
        shown = "<.1" if share < 0.1 else f"{share:.2g}" if share < 10 else f"{share:.0f}"
        style = {"ha": "center", "va": "top", "fontsize": 7.5, "color": MUTED}
        axis.annotate(shown, (middle, 1.0), xycoords=("data", "axes fraction"), **style)


def _at_the_ends(group: xr.Dataset, name: str, decay: float) -> str:
    """A variable of the rarest and of the most frequent bin at one weight decay, in words."""
    mean = over_seeds(group, name)["mean"].sel(weight_decay=decay)
    said = [
        f"{float(mean[place]):.3g} for tokens seen {bin_range(group, place)} times"
        for place in end_bins(group)
    ]
    return f"{group.attrs['name']} at weight decay {decay:g}, {', '.join(said)}"
