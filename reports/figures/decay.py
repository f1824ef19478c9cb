"""What weight decay does to the losses of rare and of frequent tokens, and what repairs it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import xarray as xr
from matplotlib.axes import Axes

from reports.figures.panels import (
    Lines,
    bin_middles,
    caption,
    decay_panels,
    draw_band,
    ends,
    highest_bin,
    styled,
    titled_panels,
)
from reports.groups import REPAIRS, bin_range, end_bins, loss_weight_exponent, over_seeds
from reports.style import COMMON, RARE, ReportFigure, count_axis, decay_colours, loss_axis
from reports.tables import comparisons


@styled
def figure_1(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Loss of the rarest and of the most frequent tokens against weight decay (Figure 1).

    The outermost bins that hold tokens; the paper names 3^0 to 3^1 and 3^9 to 3^10 times, and on
    IMDB six tokens occur more often still.
    """
    figure = _against_decay(_end_lines, groups, narrow)
    title = "The rarest and the most frequent tokens under weight decay"
    figure.name, figure.title = "Figure 1", title
    figure.caption = caption(
        "Mean cross-entropy of the tokens in the rarest and in the most frequent bin, over the "
        "training set after the last step.",
        groups,
    )
    return figure


@styled
def figure_4(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Average against token-balanced training loss by weight decay (Figure 4)."""
    figure = _against_decay(loss_lines, groups, narrow)
    figure.name, figure.title = "Figure 4", "Average and token-balanced loss under weight decay"
    figure.caption = caption(
        "Average loss counts every token of the text once; token-balanced loss counts every entry "
        "of the vocabulary that occurs once. Measured over the whole training set after the last "
        "step.",
        groups,
    )
    return figure


def _against_decay(
    lines_of: Callable[[xr.Dataset], tuple[Lines, str]], groups: Sequence[xr.Dataset], narrow: bool
) -> ReportFigure:
    figure, axes = titled_panels(groups, narrow)
    panels, said = zip(*map(lines_of, groups), strict=True)
    decay_panels(axes, panels)
    axes[0].set_ylabel("loss (nats)")
    named = [f"{group.attrs['name']}: {words}" for group, words in zip(groups, said, strict=True)]
    figure.alt = "Loss against weight decay. " + "; ".join(named)
    return figure


def _end_lines(group: xr.Dataset) -> tuple[Lines, str]:
    """Loss of the rarest and of the most frequent bin, and both in words."""
    loss = over_seeds(group, "bin_loss")
    rare, common = (loss.isel(bin=place) for place in end_bins(group))
    seen, often = (bin_range(group, place) for place in end_bins(group))
    lines = [(rare, f"rarest\n{seen}×", RARE), (common, f"most frequent\n{often}×", COMMON)]
    return lines, (
        f"tokens seen {seen} times {ends(rare['mean'])}, "
        f"tokens seen {often} times {ends(common['mean'])}"
    )


def loss_lines(group: xr.Dataset) -> tuple[Lines, str]:
    """Token-balanced and average loss, and both in words."""
    balanced, average = (
        over_seeds(group, name) for name in ("token_balanced_loss", "average_loss")
    )
    lines = [(balanced, "token-\nbalanced", RARE), (average, "average", COMMON)]
    return lines, f"token-balanced {ends(balanced['mean'])}, average {ends(average['mean'])}"


@styled
def repair(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Loss by frequency bin at the strongest decay, a line a repair, a panel a model."""
    found = comparisons(groups)
    figure, axes = titled_panels([family[0] for _, family in found], narrow, height=3.2)
    figure.name, figure.title = "Repair", "What weighting the loss of rare tokens repairs"
    said = []
    for axis, (decay, family) in zip(axes, found, strict=True):
        said += repair_panel(axis, family, decay)
        axis.set_title(f"{family[0].attrs['name']}, weight decay {decay:g}")
    # Shared, so after all are drawn; room for the key.
    members = [group for _, family in found for group in family]
    loss_axis(axes[0], 12 * highest_bin(members))
    axes[0].set_ylabel("loss (nats)")
    figure.caption = caption(
        "Mean cross-entropy of the tokens in each frequency bin at the strongest weight decay, "
        "with each token's loss weighted by its count to the power −g (normalised). The theory "
        "predicts the best average loss at g = 1/4 and equal losses at g = 1/2, for L2 decay.",
        members,
    )
    figure.alt = "Loss by frequency bin with and without repair. " + "; ".join(said)
    return figure


def repair_panel(axis: Axes, family: Sequence[xr.Dataset], decay: float) -> list[str]:
    """A line a group with both its losses in the key; returns them in words."""
    colours = decay_colours([float(place) for place in range(len(family))])
    said = []
    for group, colour in zip(family, colours.values(), strict=True):
        average, balanced = (
            float(over_seeds(group, name)["mean"].sel(weight_decay=decay))
            for name in ("average_loss", "token_balanced_loss")
        )
        band = over_seeds(group, "bin_loss").sel(weight_decay=decay)
        draw_band(axis, bin_middles(group), band, colour)
        label = f"{_repair_name(group)}: average {average:.3f}, balanced {balanced:.3f}"
        axis.lines[-1].set_label(textwrap.fill(label, 44))  # no wider than a panel
        said.append(f"{group.attrs['name']} at weight decay {decay:g}: {label}")
    count_axis(axis, float(family[0]["bin_high"].values.max()))
    axis.legend(fontsize=7.5, loc="upper right", frameon=False, handlelength=1.2, borderpad=0)
    return said


def _repair_name(group: xr.Dataset) -> str:
    config = group.attrs["config"]
    spared = config.get("decay") or REPAIRS["decay"]
    name = f"g = {loss_weight_exponent(config):g}"
    return name if spared == REPAIRS["decay"] else f"{name}, decay on {spared}"
