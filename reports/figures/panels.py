"""The paper's figures, one function each, from the labelled datasets of `reports.groups`.

Every function takes one or more groups of comparable runs and draws one panel for each, on shared
axes. `narrow` stacks the panels for a phone. Lines are means over seeds, bands are 95 % Student-t
intervals over seeds; a single seed has no band. All are drawn on the object-oriented interface:
no pyplot, no global state.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import ParamSpec

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from frequency_bins import percentile, rare_share
from reports.groups import (
    MOST_NAMED_CLASSES,
    REPAIRS,
    corpus,
    count_range,
    describe,
    display_label,
    display_text,
    effective_counts,
    end_bins,
    loss_weight_exponent,
    over_seeds,
    seed_mean,
    weight_decays,
)
from reports.last_layers import NORMS
from reports.ranks import rank_and_class
from reports.style import (
    CLOUD,
    COMMON,
    GRID,
    INK,
    MUTED,
    RARE,
    STYLE,
    ReportFigure,
    count_axis,
    decay_colours,
    label_ends,
    loss_axis,
    plain_number,
)
from reports.tables import comparisons, law_loss
from reports.wording import worded

P = ParamSpec("P")
Draw = Callable[P, ReportFigure]


def styled(draw: Draw[P]) -> Draw[P]:
    """Draw under the report's style without touching matplotlib's global settings."""

    @functools.wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> ReportFigure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        _reword(figure, [arg for arg in args if isinstance(arg, xr.Dataset)])
        return figure

    return inside


@styled
def glance(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Paradox, theory and (where the groups hold one) repair of one model, side by side.

    The model is the first that is repaired, else the first; theory and repair are at the strongest
    weight decay that they have.
    """
    found = comparisons(groups)
    decay, family = found[0] if found else (max(weight_decays(groups[:1])), groups[:1])
    group, panels = family[0], 3 if found else 2
    size = (3.6, 2.6 * panels) if narrow else (3.3 * panels, 2.9)
    figure = ReportFigure(figsize=size, layout="constrained")
    axes = list(figure.subplots(*((panels, 1) if narrow else (1, panels))).flat)
    balanced, average = (
        over_seeds(group, name) for name in ("token_balanced_loss", "average_loss")
    )
    _decay_panels(axes[:1], [[(balanced, "token-\nbalanced", RARE), (average, "average", COMMON)]])
    axes[0].set_ylabel("loss (nats)")
    said = [f"token-balanced {_ends(balanced['mean'])}, average {_ends(average['mean'])}"]
    colour = decay_colours(weight_decays([group]))[decay]
    said.append(_law_panel(axes[1], group, decay, colour))
    _law_axes(axes[1], [group], _highest_loss(group, decay))
    axes[1].set_xlabel("training count (log scale)")
    if found:
        said += _repair_panel(axes[2], family, decay)
        loss_axis(axes[2], 12 * max(_highest_bin(member) for member in family))
    titles = ("Paradox", f"Theory, λ = {decay:g}", f"Repair, λ = {decay:g}")
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    name = group.attrs["name"]
    figure.name, figure.title = "At a glance", f"{name}: what happens, why, and what helps"
    repaired = " Repair: each token's loss weighted by its count to the power −g." if found else ""
    figure.caption = _caption(
        "Paradox: the average hides what the rare tokens pay, which shows where every entry of the "
        "vocabulary counts once. Theory: the line is the law with its one fitted number n_c, made "
        "for exact minima under L2 decay; R² tells how well it fits. "
        f"{_marks([group])}{repaired}",
        [group],
    )
    figure.alt = f"Paradox, theory and repair. {name}: " + "; ".join(said)
    return figure


@styled
def figure_1(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Loss of the rarest and of the most frequent tokens against weight decay (Figure 1).

    The outermost bins that hold tokens; the paper names 3^0 to 3^1 and 3^9 to 3^10 times, and on
    IMDB six tokens occur more often still.
    """
    figure, axes = _panels(groups, narrow)
    figure.name, figure.title = (
        "Figure 1",
        "The rarest and the most frequent tokens under weight decay",
    )
    panels, said = [], []
    for group in groups:
        rare, common = end_bins(group)
        loss = over_seeds(group, "bin_loss")
        panels.append(
            [
                (loss.isel(bin=rare), f"rarest\n{_bin_range(group, rare)}×", RARE),
                (loss.isel(bin=common), f"most frequent\n{_bin_range(group, common)}×", COMMON),
            ],
        )
        said.append(
            f"{group.attrs['name']}: tokens seen {_bin_range(group, rare)} times "
            f"{_ends(loss['mean'].isel(bin=rare))}, tokens seen {_bin_range(group, common)} times "
            f"{_ends(loss['mean'].isel(bin=common))}"
        )
    _decay_panels(axes, panels)
    axes[0].set_ylabel("loss (nats)")
    figure.caption = _caption(
        "Mean cross-entropy of the tokens in the rarest and in the most frequent bin, over the "
        "training set after the last step.",
        groups,
    )
    figure.alt = "Loss against weight decay. " + "; ".join(said)
    return figure


@styled
def figure_2(group: xr.Dataset, tokens: Sequence[str], *, narrow: bool = False) -> ReportFigure:
    """A text with its rare and its frequent tokens in two colours (Figure 2).

    `tokens`: labels of the group's classes in the order of the text, each with the space before
    it that is part of it. Rare is below the 99th percentile of the counts of the tokens that
    occur. These are next-token counts; the paper's threshold of 1026 counts every position of
    IMDB, where next tokens give 1023. Raises ValueError for a label that is no class.
    """
    counts = dict(zip(group["label"].values.tolist(), group["class_count"].values, strict=True))
    if unknown := [token for token in tokens if token not in counts]:
        raise ValueError(f"token {unknown[0]!r} is not in the vocabulary of {group.attrs['name']}")
    threshold = percentile(group["class_count"].values, 99)
    columns = 44 if narrow else 96
    cells, column, row = [], 0, 0
    for token in tokens:
        shown = display_text(token.replace("Ġ", " "))
        if column and column + len(shown) > columns:
            column, row, shown = 0, row + 1, shown.lstrip(" ")
        cells.append((column, row, shown, counts[token] < threshold))
        column += len(shown)
    width, line = (3.6 if narrow else 7.6), 0.2
    height = line * (row + 1)
    figure = ReportFigure(figsize=(width, height))
    for column, row, shown, rare in cells:
        figure.text(
            column / columns,
            1 - (row + 0.75) * line / height,
            shown.lstrip(" ").rjust(len(shown), "\u00a0"),
            color=RARE if rare else COMMON,
            fontweight="bold" if rare else "normal",
            family="monospace",
            fontsize=72 * width / columns / 0.602,
        )
    number = sum(rare for *_, rare in cells)
    figure.name, figure.title = "Figure 2", "A text by the frequency of its tokens"
    figure.caption = _caption(
        f"Orange and bold: tokens seen fewer than {threshold:,.0f} times in training (the 99th "
        "percentile of the counts of the tokens that occur); blue: the others.",
        [group],
        runs=False,
    )
    figure.alt = f"{number} of {len(cells)} tokens of the text are rare: " + "".join(
        f"[{shown.strip()}]" if rare else shown for *_, shown, rare in cells
    )
    return figure


@styled
def figure_3a(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Share of all tokens that the most frequent classes make up (Figure 3a)."""
    figure, axes = _panels(groups, narrow)
    figure.name, figure.title = "Figure 3a", "How much of the text the most frequent tokens make up"
    said = []
    for axis, group in zip(axes, groups, strict=True):
        counts = np.sort(group["class_count"].values)[::-1].astype(np.float64)
        share = np.cumsum(counts) / counts.sum()
        rank = np.arange(1, len(counts) + 1) / len(counts)
        kept = np.unique(np.geomspace(1, len(counts), 400).astype(int)) - 1
        axis.plot(100 * rank[kept], 100 * share[kept], color=COMMON)
        for fraction in (0.5, 0.8, 0.95):
            needed = rank[np.searchsorted(share, fraction)]
            axis.plot([100 * needed], [100 * fraction], "o", color=COMMON)
            right = needed * len(counts) < len(counts) ** 0.55
            axis.annotate(
                f"{fraction:.0%} in the top {100 * needed:.2g} %",
                (100 * needed, 100 * fraction),
                xytext=(6, -9) if right else (-6, 3),
                textcoords="offset points",
                ha="left" if right else "right",
                color=INK,
                fontsize=8.5,
            )
            said.append(f"{fraction:.0%} of the text in the top {100 * needed:.2g} % of tokens")
        axis.set_xscale("log")
        axis.set_xlim(100 / len(counts) * 0.8, 140)
        axis.minorticks_off()
        axis.set_xticks([10.0**k for k in range(-3, 3) if 10.0**k >= 80 / len(counts)])
        axis.xaxis.set_major_formatter(plain_number)
        axis.set_ylim(0, 104)
        axis.set_xlabel("most frequent tokens, % of the vocabulary")
    axes[0].set_ylabel("% of the text covered")
    figure.caption = _caption(
        "Share of the training text made up by the most frequent tokens. The paper's Section 4.1 "
        "says that the top 0.01 % of the tokens hold 95 % of IMDB; counted, it takes the top 30 %.",
        groups,
        runs=False,
    )
    figure.alt = "Coverage curve: " + ", ".join(said)
    return figure


@styled
def figure_3b(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Share of rare tokens by vocabulary size, one line a corpus (Figure 3b)."""
    figure, (axis,) = _panels(groups[:1], narrow)
    figure.name, figure.title = "Figure 3b", "Share of rare tokens by vocabulary size"
    axis.set_title("")
    points: dict[str, dict[int, float]] = {}
    for group in groups:
        rare = 100 * rare_share(group["class_count"].values)
        points.setdefault(corpus(group), {})[group.sizes["class"]] = rare
    colours = decay_colours(list(range(len(points))))
    ends = []
    for (name, shares), colour in zip(points.items(), colours.values(), strict=True):
        sizes = sorted(shares)
        axis.plot(sizes, [shares[size] for size in sizes], "o-", color=colour)
        ends.append((sizes[-1], shares[sizes[-1]], name, colour))
    axis.set_xscale("log")
    axis.set_xticks(sorted({size for shares in points.values() for size in shares}))
    axis.minorticks_off()
    axis.xaxis.set_major_formatter(plain_number)
    axis.set_ylim(0, 100)
    label_ends(axis, ends)
    axis.set_xlabel("vocabulary size V")
    axis.set_ylabel("rare entries, % of the vocabulary")
    figure.caption = _caption(
        "Entries of the vocabulary outside the most frequent ones that make up 95 % of the text.",
        groups,
        runs=False,
    )
    figure.alt = "Share of rare tokens: " + "; ".join(
        f"{name} {share:.3g} % at V = {size:,}"
        for name, shares in points.items()
        for size, share in sorted(shares.items())
    )
    return figure


@styled
def figure_4(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Average against token-balanced training loss by weight decay (Figure 4)."""
    figure, axes = _panels(groups, narrow)
    figure.name, figure.title = "Figure 4", "Average and token-balanced loss under weight decay"
    panels, said = [], []
    for group in groups:
        balanced = over_seeds(group, "token_balanced_loss")
        average = over_seeds(group, "average_loss")
        panels.append([(balanced, "token-\nbalanced", RARE), (average, "average", COMMON)])
        said.append(
            f"{group.attrs['name']}: token-balanced {_ends(balanced['mean'])}, "
            f"average {_ends(average['mean'])}"
        )
    _decay_panels(axes, panels)
    axes[0].set_ylabel("loss (nats)")
    figure.caption = _caption(
        "Average loss counts every token of the text once; token-balanced loss counts every entry "
        "of the vocabulary that occurs once. Measured over the whole training set after the last "
        "step.",
        groups,
    )
    figure.alt = "Loss against weight decay. " + "; ".join(said)
    return figure


@styled
def figure_5(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Learning speed of every token against its count at the largest weight decay (Figure 5)."""
    figure, axes = _panels(groups, narrow)
    figure.name, figure.title = "Figure 5", "How fast every token is learned"
    for axis, group in zip(axes, groups, strict=True):
        decay = _cloud(axis, group, "learning_speed", "bin_learning_speed")
        axis.set_title(f"{group.attrs['name']}, weight decay {decay:g}")
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("learning speed S (0 to 1)")
    figure.caption = _caption(
        "One grey point a token, the mean of each frequency bin in colour. S = 1 − AUC/T of the "
        "token's min–max normalised loss over training: 1 is learned at once.",
        groups,
    )
    figure.alt = _cloud_alt("Learning speed", groups, "bin_learning_speed")
    return figure


@styled
def figure_6a(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Loss of every token against its count at the largest weight decay (Figure 6a)."""
    figure, axes = _panels(groups, narrow)
    figure.name, figure.title = "Figure 6a", "The loss of every token"
    highest = max(_highest_loss(group, max(weight_decays([group]))) for group in groups)
    for axis, group in zip(axes, groups, strict=True):
        decay = _cloud(axis, group, "loss", "bin_loss")
        axis.set_title(f"{group.attrs['name']}, weight decay {decay:g}")
        loss_axis(axis, highest)
    axes[0].set_ylabel("loss (nats)")
    figure.caption = _caption(
        "One grey point a token, averaged over seeds; the mean of each frequency bin in colour.",
        groups,
    )
    figure.alt = _cloud_alt("Loss", groups, "bin_loss")
    return figure


@styled
def figure_6b(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Accuracy of every token against its count at the largest weight decay (Figure 6b)."""
    figure, axes = _panels(groups, narrow)
    figure.name, figure.title = "Figure 6b", "The accuracy of every token"
    for axis, group in zip(axes, groups, strict=True):
        decay = _cloud(axis, group, "accuracy", "bin_accuracy", scale=100)
        axis.set_title(f"{group.attrs['name']}, weight decay {decay:g}")
        axis.set_ylim(-3, 103)
    axes[0].set_ylabel("accuracy (%)")
    figure.caption = _caption(
        "One grey point a token, averaged over seeds; the mean of each frequency bin in colour.",
        groups,
    )
    figure.alt = _cloud_alt("Accuracy", groups, "bin_accuracy")
    return figure


@styled
def figure_7a(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Loss by frequency bin, one line a weight decay (Figures 6a and 7a)."""
    figure, axes = _panels(groups, narrow, height=3.2)
    figure.name, figure.title = "Figure 7a", "Loss by how often a token occurs"
    highest = max(_highest_bin(group) for group in groups)
    for axis, group in zip(axes, groups, strict=True):
        _bin_lines(axis, group, over_seeds(group, "bin_loss"), weight_decays(groups))
        loss_axis(axis, 2.5 * highest)
        sizes = group["bin_size"].values
        _bin_shares(axis, group, sizes / sizes.sum())
    axes[0].set_ylabel("loss (nats)")
    _decay_key(figure, weight_decays(groups))
    figure.caption = _caption(
        "Mean cross-entropy of the tokens in each frequency bin (powers of 3 of the training "
        "count). Grey numbers: share of the vocabulary that occurs in each bin, in %.",
        groups,
    )
    figure.alt = _bins_alt("Loss", groups, "bin_loss")
    return figure


@styled
def repair(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Loss by frequency bin at the strongest decay, a line a repair, a panel a model."""
    found = comparisons(groups)
    figure, axes = _panels([family[0] for _, family in found], narrow, height=3.2)
    figure.name, figure.title = "Repair", "What weighting the loss of rare tokens repairs"
    said = []
    for axis, (decay, family) in zip(axes, found, strict=True):
        said += _repair_panel(axis, family, decay)
        axis.set_title(f"{family[0].attrs['name']}, weight decay {decay:g}")
    # Shared, so after all are drawn; room for the key.
    members = [group for _, family in found for group in family]
    loss_axis(axes[0], 12 * max(_highest_bin(group) for group in members))
    axes[0].set_ylabel("loss (nats)")
    figure.caption = _caption(
        "Mean cross-entropy of the tokens in each frequency bin at the strongest weight decay, "
        "with each token's loss weighted by its count to the power −g (normalised). The theory "
        "predicts the best average loss at g = 1/4 and equal losses at g = 1/2, for L2 decay.",
        members,
    )
    figure.alt = "Loss by frequency bin with and without repair. " + "; ".join(said)
    return figure


def _repair_panel(axis: Axes, family: Sequence[xr.Dataset], decay: float) -> list[str]:
    """A line a group with both its losses in the key; returns them in words."""
    colours = decay_colours([float(place) for place in range(len(family))])
    said = []
    for group, colour in zip(family, colours.values(), strict=True):
        average, balanced = (
            float(over_seeds(group, name)["mean"].sel(weight_decay=decay))
            for name in ("average_loss", "token_balanced_loss")
        )
        band = over_seeds(group, "bin_loss").sel(weight_decay=decay)
        _band(axis, _bin_middles(group), band, colour)
        label = f"{_repair_name(group)}: average {average:.3f}, balanced {balanced:.3f}"
        axis.lines[-1].set_label(label)
        said.append(f"{group.attrs['name']} at weight decay {decay:g}: {label}")
    count_axis(axis, float(family[0]["bin_high"].values.max()))
    axis.set_xlabel("training count (log scale)")
    axis.legend(fontsize=7.5, loc="upper right", frameon=False, handlelength=1.2, borderpad=0)
    return said


def _repair_name(group: xr.Dataset) -> str:
    config = group.attrs["config"]
    spared = config.get("decay") or REPAIRS["decay"]
    name = f"g = {loss_weight_exponent(config):g}"
    return name if spared == REPAIRS["decay"] else f"{name}, decay on {spared}"


@styled
def figure_7b(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Learning speed by frequency bin, one line a weight decay (Figures 5 and 7b)."""
    figure, axes = _panels(groups, narrow, height=3.2)
    figure.name, figure.title = "Figure 7b", "Learning speed by how often a token occurs"
    for axis, group in zip(axes, groups, strict=True):
        _bin_lines(axis, group, over_seeds(group, "bin_learning_speed"), weight_decays(groups))
        axis.set_ylim(0, 1.08)
        _bin_shares(axis, group, group["bin_windows_seen"].values.mean(axis=0))
    axes[0].set_ylabel("learning speed S (0 to 1)")
    _decay_key(figure, weight_decays(groups))
    figure.caption = _caption(
        "S = 1 − AUC/T of each token's min–max normalised loss over training, averaged over the "
        "tokens of a bin: 1 is learned at once, 0 never. Grey numbers: share of the windows of "
        "training that saw a token of the bin, in %; in the others its loss is the last one seen.",
        groups,
    )
    figure.alt = _bins_alt("Learning speed", groups, "bin_learning_speed")
    return figure


@styled
def figure_8(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """How many classes occur how often (Figure 8)."""
    figure, axes = _panels(groups, narrow)
    figure.name, figure.title = "Figure 8", "How often the entries of the vocabulary occur"
    said = []
    for axis, group in zip(axes, groups, strict=True):
        sizes = group["bin_size"].values
        low, high = group["bin_low"].values, group["bin_high"].values
        axis.bar(
            low,
            sizes,
            width=(high - low) * 1.0,
            align="edge",
            color=COMMON,
            alpha=0.85,
            edgecolor=GRID,
            linewidth=0.6,
        )
        count_axis(axis, float(high.max()))
        axis.set_yscale("log")
        axis.set_ylim(0.7, sizes.max() * 2.4)
        axis.yaxis.set_major_formatter(plain_number)
        axis.minorticks_off()
        for left, right, size in zip(low, high, sizes, strict=True):
            if size:
                axis.text(
                    math.sqrt(left * right),
                    size * 1.12,
                    f"{size:,}",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color=INK,
                )
        never = int(group.attrs["never_occurring"])
        axis.set_xlabel(f"training count ({never:,} of {group.sizes['class']:,} never occur)")
        said.append(
            ", ".join(
                f"{size:,} tokens occur {count_range(int(a), int(b))} times"
                for a, b, size in zip(low, high, sizes, strict=True)
                if size
            )
        )
    axes[0].set_ylabel("entries of the vocabulary")
    figure.caption = _caption(
        "Vocabulary entries by next-token count in the training set, in bins of powers of 3.",
        groups,
        runs=False,
    )
    figure.alt = "Histogram: " + "; ".join(said)
    return figure


@styled
def figure_9(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Test accuracy of each class, the rarest first, one line a weight decay (Figure 9).

    Shuffled runs are drawn by rank in count, then by class.
    """
    views = [view for group in groups for view in rank_and_class(group)]
    figure, axes = _panels(views, narrow, height=3.4, sharex=False)
    figure.name, figure.title = "Figure 9", "Test accuracy of each class"
    decays = weight_decays(groups)
    colours = decay_colours(decays)
    said = []
    for axis, view in zip(axes, views, strict=True):
        names, mean = _class_lines(axis, view, "test_accuracy", colours, scale=100)
        axis.set_ylim(0, 103)
        first = mean.isel({"class": 0})
        said.append(f"{view.attrs['name']}: {names[0]} {_ends(first, unit=' %')}")
    axes[0].set_ylabel("test accuracy (%)")
    _decay_key(figure, decays)
    figure.caption = _caption(
        "Accuracy on the test set after the last step, classes in order of their training count "
        "(in brackets); where the seed chose which class has which count, by rank in count and, "
        "over the same runs, by class.",
        groups,
    )
    figure.alt = "Test accuracy by class, the rarest first. " + "; ".join(said)
    return figure


def _class_lines(
    axis: Axes, group: xr.Dataset, name: str, colours: dict[float, str], *, scale: float = 1.0
) -> tuple[list[str], xr.DataArray]:
    """A variable by class, the rarest first, a line a weight decay; the names, and the means."""
    names, order = _named_by_count(group)
    band = over_seeds(group, name).isel({"class": order})
    for decay in band["weight_decay"].values:
        at = scale * band[["mean", "half_width"]].sel(weight_decay=decay)
        _band(axis, np.arange(len(order)), at, colours[float(decay)])
    axis.set_xticks(range(len(order)), names, rotation=45, ha="right", rotation_mode="anchor")
    return names, scale * band["mean"]


def _named_by_count(group: xr.Dataset) -> tuple[list[str], np.ndarray]:
    """Names of the classes with their counts, the rarest first, and their places; without counts
    as they are."""
    labels = [display_label(str(label)) for label in group["label"].values]
    if "class_count" not in group.coords:
        return labels, np.arange(len(labels))
    counts = group["class_count"].values
    order = np.argsort(counts, kind="stable")
    return [f"{labels[place]} ({counts[place]:,})" for place in order], order


@styled
def last_layer(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Norms of the class means and of the classifiers by class, a panel each for every group."""
    panels = [(group, name) for group in groups for name in NORMS]
    titled = [
        group.assign_attrs(name=f"{group.attrs['name']}: {NORMS[name]}") for group, name in panels
    ]
    figure, axes = _panels(titled, narrow, height=3.4, sharex=False)
    figure.name, figure.title = "Last layer", "Norms of class means and classifiers"
    decays = weight_decays(groups)
    said = []
    for axis, (group, name), shown in zip(axes, panels, titled, strict=True):
        names, mean = _class_lines(axis, group, name, decay_colours(decays))
        first = mean.isel({"class": 0})
        said.append(f"{shown.attrs['name']}: {names[0]} {_ends(first, unit='')}")
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel("norm over the mean norm")
    _decay_key(figure, decays)
    figure.caption = _caption(
        "Length of a class's mean feature, less the global mean, and of its row of the classifier, "
        "each over the mean of all classes: 1 everywhere on the balanced simplex. Classes in order "
        "of their training count (in brackets).",
        groups,
    )
    figure.alt = "Norms by class, the rarest first, over their mean. " + "; ".join(said)
    return figure


def theory_over_images(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """`theory_over_losses` of the images on a page about text."""
    return theory_over_losses(*groups, narrow=narrow)


@styled
def theory_over_losses(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Measured loss against count with the corrected law at its fitted n_c, a panel a decay."""
    cells = [(group, decay) for group in groups for decay in weight_decays([group])]
    columns = 2 if narrow else max(len(weight_decays([group])) for group in groups)
    columns = min(columns, 6)
    rows = sum(-(-len(weight_decays([group])) // columns) for group in groups)
    figure, axes = _grid(rows, columns, (3.6 if narrow else max(2.0 * columns, 4.6), 2.0 * rows))
    figure.name, figure.title = "Theory", "One fitted number, n_c, against every token's loss"
    place, said = 0, []
    colours = decay_colours(weight_decays(groups))
    highest = max(_highest_loss(group, decay) for group, decay in cells)
    _law_axes(axes[0], groups, highest)  # which all panels share
    for group in groups:
        for position, decay in enumerate(weight_decays([group])):
            axis = axes[place + position]
            said.append(_law_panel(axis, group, decay, colours[decay]))
            first = (place + position) % columns == 0
            axis.tick_params(labelleft=first)
            if first:
                axis.set_ylabel("loss (nats)")
                axis.set_title(
                    f"{group.attrs['name']}\n{axis.get_title('left').strip()}", fontsize=8.5
                )
        place += -(-len(weight_decays([group])) // columns) * columns
    for axis in axes:
        if not axis.has_data():
            axis.remove()
    figure.caption = _caption(
        f"{_marks(groups)} Line: the corrected law "
        "loss = −log(1 − (1 − 1/V)·√(n_c/n)), flat at log V for n ≤ n_c, with the critical count "
        "n_c fitted to all tokens of a run, each weighed by its count, since the mean of n losses "
        "varies as 1/n; R² is over the tokens, so weighed, in 1 − exp(−loss). The law is that of "
        "exact minima under L2 decay with free features; to a trained network it is a fit.",
        groups,
    )
    figure.alt = "Loss against count with the fitted law. " + "; ".join(said)
    assert len(said) == len(cells)
    return figure


@styled
def critical_count(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Fitted critical count n_c against weight decay."""
    figure, axes = _panels(groups, narrow)
    figure.name, figure.title = "Theory", "The fitted critical count under weight decay"
    bands = [over_seeds(group, "critical_count") for group in groups]
    _decay_panels(axes, [[(band, "", RARE)] for band in bands])
    for axis, band in zip(axes, bands, strict=True):
        named = _apart(band["weight_decay"].values, 0.14)
        for decay, mean in zip(band["weight_decay"].values, band["mean"].values, strict=True):
            if decay not in named:
                continue
            axis.annotate(
                _rounded(mean),
                (decay, mean),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color=INK,
                fontsize=8.5,
            )
        axis.margins(x=0.09)
    axes[0].set_ylim(0, 1.1 * axes[0].get_ylim()[1])
    said = [
        f"{group.attrs['name']}: {_ends(band['mean'], unit='')}"
        for group, band in zip(groups, bands, strict=True)
    ]
    axes[0].set_ylabel("critical count n_c")
    figure.caption = _caption(
        "The count at or below which the theory says a token is neglected altogether, fitted to "
        "each run's losses.",
        groups,
    )
    figure.alt = "Fitted critical count against weight decay. " + "; ".join(said)
    return figure


def _reword(figure: ReportFigure, groups: Sequence[xr.Dataset]) -> None:
    figure.title, figure.alt = worded(figure.title, groups), worded(figure.alt, groups)
    for axis in figure.axes:
        for text in (axis.xaxis.label, axis.yaxis.label, *axis.texts):
            text.set_text(worded(text.get_text(), groups))


def _grid(
    rows: int, columns: int, size: tuple[float, float], *, sharex: bool = True
) -> tuple[ReportFigure, list[Axes]]:
    figure = ReportFigure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=sharex, sharey=True, squeeze=False)
    return figure, list(axes.flat)


def _panels(
    groups: Sequence[xr.Dataset], narrow: bool, height: float = 2.9, *, sharex: bool = True
) -> tuple[ReportFigure, list[Axes]]:
    """One titled panel a group: up to two side by side, one under the other where narrow."""
    if not groups:
        raise ValueError("no groups of runs to draw; expected at least one")
    columns = 1 if narrow else min(len(groups), 2)
    rows = -(-len(groups) // columns)
    width = 3.6 if narrow else 4.6 * columns
    size = (width, (height - 0.2 * narrow) * rows)
    figure, axes = _grid(rows, columns, size, sharex=sharex)
    for axis in axes[len(groups) :]:
        axis.remove()
    for axis, group in zip(axes, groups, strict=False):
        axis.set_title(textwrap.fill(group.attrs["name"], 40 if narrow else 52))
        axis.tick_params(labelbottom=True)
    return figure, axes[: len(groups)]


Lines = Sequence[tuple[xr.Dataset, str, str]]


def _decay_panels(axes: Sequence[Axes], panels: Sequence[Lines]) -> None:
    """Means and seed bands against weight decay: a panel's lines are (band, label, colour)."""
    tops = []
    for axis, lines in zip(axes, panels, strict=True):
        decays = lines[0][0]["weight_decay"].values
        for band, _, colour in lines:
            _band(axis, decays, band, colour)
            tops.append((band["mean"] + band["half_width"].fillna(0)).max())
        axis.set_xticks(_apart(decays))
        axis.xaxis.set_major_formatter(plain_number)
        axis.set_xlabel("weight decay λ")
    axes[0].set_ylim(0, 1.08 * float(max(tops)) or 1.0)  # shared, so after all are drawn
    for axis, lines in zip(axes, panels, strict=True):
        ends = [
            (float(band["weight_decay"][-1]), float(band["mean"][-1]), label, colour)
            for band, label, colour in lines
        ]
        label_ends(axis, ends)


def _apart(places: np.ndarray, least: float = 0.04) -> list[float]:
    """The places that are far enough (of their whole span) from the one before to be named."""
    kept = [float(places[0])]
    for place in places[1:]:
        if place - kept[-1] > least * (places[-1] - places[0]):
            kept.append(float(place))
    return kept


def _bin_middles(group: xr.Dataset) -> np.ndarray:
    low, high = group["bin_low"].values, group["bin_high"].values
    return np.sqrt(low * np.maximum(high - 1, low).astype(np.float64))


def _bin_range(group: xr.Dataset, place: int) -> str:
    return count_range(int(group["bin_low"].values[place]), int(group["bin_high"].values[place]))


def _bin_lines(axis: Axes, group: xr.Dataset, band: xr.Dataset, decays: Sequence[float]) -> None:
    colours = decay_colours(decays)
    for decay in band["weight_decay"].values:
        at = band.sel(weight_decay=decay)
        _band(axis, _bin_middles(group), at, colours[float(decay)])
    count_axis(axis, float(group["bin_high"].values.max()))
    axis.set_xlabel("training count (log scale)")


def _band(axis: Axes, x: np.ndarray, band: xr.Dataset, colour: str) -> None:
    """A line of means with its seed band, where there is a mean."""
    drawn = np.isfinite(band["mean"].values)
    mean, half = band["mean"].values[drawn], band["half_width"].values[drawn]
    shade = {"color": colour, "alpha": 0.18, "linewidth": 0}
    axis.fill_between(x[drawn], mean - half, mean + half, **shade)
    axis.plot(x[drawn], mean, "o-", color=colour)


def _bin_shares(axis: Axes, group: xr.Dataset, shares: np.ndarray) -> None:
    """A share for each bin that holds classes, in %, along the top of the panel."""
    held = group["bin_size"].values > 0
    for middle, share in zip(_bin_middles(group)[held], 100 * shares[held], strict=True):
        axis.annotate(
            "<.1" if share < 0.1 else f"{share:.2g}" if share < 10 else f"{share:.0f}",
            (middle, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=7.5,
            color=MUTED,
        )


def _decay_key(figure: ReportFigure, decays: Sequence[float]) -> None:
    colours = decay_colours(decays)
    handles = [
        matplotlib.lines.Line2D([], [], color=colours[decay], marker="o", label=f"{decay:g}")
        for decay in decays
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(decays), 7),
        title="weight decay λ",
        alignment="left",
        fontsize=8.5,
        title_fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.2,
        borderpad=0,
    )


def _cloud(
    axis: Axes, group: xr.Dataset, per_class: str, per_bin: str, *, scale: float = 1.0
) -> float:
    """Every class at the largest weight decay, mean over seeds, and the bins' means over it."""
    decay = max(weight_decays([group]))
    chosen = group["weight_decay"].values == decay
    counts = group["class_count"].values
    values = scale * seed_mean(group, per_class, decay)
    drawn = (counts > 0) & np.isfinite(values)
    axis.scatter(
        counts[drawn], values[drawn], s=5, color=CLOUD, alpha=0.3, linewidths=0, rasterized=True
    )
    means = scale * group[per_bin].values[chosen].mean(axis=0)
    axis.plot(_bin_middles(group), means, "o-", color=RARE)
    count_axis(axis, float(counts.max()))
    axis.set_xlabel("training count (log scale)")
    return decay


def _highest_loss(group: xr.Dataset, decay: float) -> float:
    return float(np.nanmax(seed_mean(group, "loss", decay)))


def _highest_bin(group: xr.Dataset) -> float:
    return float(np.nanmax(group["bin_loss"].values))


def _law_axes(axis: Axes, groups: Sequence[xr.Dataset], highest: float) -> None:
    count_axis(axis, max(float(group["class_count"].values.max()) for group in groups))
    few = any(group.sizes["class"] <= MOST_NAMED_CLASSES for group in groups)
    loss_axis(axis, 10 * highest if few else highest)  # few may all be high, where the text is


def _law_panel(axis: Axes, group: xr.Dataset, decay: float, colour: str) -> str:
    chosen = group["weight_decay"].values == decay
    counts = group["class_count"].values
    values = seed_mean(group, "loss", decay)
    drawn = (counts > 0) & np.isfinite(values)
    if len(counts) <= MOST_NAMED_CLASSES:
        points = counts[drawn], values[drawn]
    else:
        axis.scatter(
            counts[drawn],
            values[drawn],
            s=3,
            color=CLOUD,
            alpha=0.25,
            linewidths=0,
            rasterized=True,
        )
        points = _bin_middles(group), group["bin_loss"].values[chosen].mean(axis=0)
    axis.plot(*points, "o", color=colour, markersize=4)
    fitted = float(group["critical_count"].values[chosen].mean())
    r_squared = float(group["r_squared"].values[chosen].mean())
    grid = np.geomspace(1, counts.max(), 200)
    effective = effective_counts(grid, counts, loss_weight_exponent(group.attrs["config"]))
    curve = law_loss(effective, fitted, vocab_size=group.sizes["class"])
    axis.plot(grid, curve, color=INK, linewidth=1.3)
    axis.set_title(f"\nλ = {decay:g}", fontsize=8.5)
    axis.text(
        0.97,
        0.97,
        f"n_c = {_rounded(fitted)}\nR² = {r_squared:.2f}",
        ha="right",
        va="top",
        transform=axis.transAxes,
        fontsize=8.5,
    )
    axis.tick_params(labelbottom=True)
    axis.set_xlabel("count", fontsize=8.5)
    return (
        f"{group.attrs['name']} at weight decay {decay:g}: n_c {_rounded(fitted)}, "
        f"R squared {r_squared:.2f}"
    )


def _rounded(value: float) -> str:
    """Three digits, or a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ends(mean: xr.DataArray, unit: str = " nats") -> str:
    """ "0.10 nats at weight decay 0 to 1.2 nats at weight decay 1"."""
    decays = mean["weight_decay"].values
    first = f"{float(mean[0]):.3g}{unit} at weight decay {decays[0]:g}"
    if len(decays) == 1:
        return first
    return f"{first} to {float(mean[-1]):.3g}{unit} at weight decay {decays[-1]:g}"


def _caption(text: str, groups: Sequence[xr.Dataset], *, runs: bool = True) -> str:
    """The text, then what was run; groups that were run alike are named together."""
    names: dict[str, list[str]] = {}
    for group in groups:
        names.setdefault(describe(group, seeds_too=runs), []).append(group.attrs["name"])
    said = [f"{' and '.join(who)} on {how}" if runs else how for how, who in names.items()]
    text = worded(text, groups)
    return f"{text} {'Runs' if runs else 'Corpus'}: {'; '.join(said)}."


def _marks(groups: Sequence[xr.Dataset]) -> str:
    """What the panels of `_law_panel` show."""
    if all(group.sizes["class"] <= MOST_NAMED_CLASSES for group in groups):
        return "Points: every token."
    return "Grey: every token. Points: the mean of each frequency bin."


def _cloud_alt(what: str, groups: Sequence[xr.Dataset], name: str) -> str:
    said = []
    for group in groups:
        decay = max(weight_decays([group]))
        mean = over_seeds(group, name)["mean"].sel(weight_decay=decay)
        said.append(f"{group.attrs['name']} at weight decay {decay:g}, {_across(group, mean)}")
    return f"{what} of every token against its count. " + "; ".join(said)


def _bins_alt(what: str, groups: Sequence[xr.Dataset], name: str) -> str:
    said = []
    for group in groups:
        mean = over_seeds(group, name)["mean"]
        for decay in {mean["weight_decay"].values[0], mean["weight_decay"].values[-1]}:
            at = mean.sel(weight_decay=decay)
            said.append(f"{group.attrs['name']} at weight decay {decay:g}, {_across(group, at)}")
    return f"{what} by frequency bin. " + "; ".join(said)


def _across(group: xr.Dataset, mean: xr.DataArray) -> str:
    rare, common = end_bins(group)
    return (
        f"{float(mean[rare]):.3g} for tokens seen {_bin_range(group, rare)} times, "
        f"{float(mean[common]):.3g} for tokens seen {_bin_range(group, common)} times"
    )
