"""The training text itself: Figures 2, 3a, 3b and 8."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr

from frequency_bins import percentile, rare_share
from reports.figures.panels import caption, styled, titled_panels
from reports.groups import bin_range, corpus, display_text
from reports.style import (
    COMMON,
    GRID,
    INK,
    RARE,
    ReportFigure,
    count_axis,
    decay_colours,
    label_ends,
    note,
    plain_number,
)


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
        style = {"color": RARE, "fontweight": "bold"} if rare else {"color": COMMON}
        figure.text(
            column / columns,
            1 - (row + 0.75) * line / height,
            shown.lstrip(" ").rjust(len(shown), "\u00a0"),
            family="monospace",
            fontsize=72 * width / columns / 0.602,
            **style,
        )
    number = sum(rare for *_, rare in cells)
    figure.name, figure.title = "Figure 2", "A text by the frequency of its tokens"
    figure.caption = caption(
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
    figure, axes = titled_panels(groups, narrow)
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
            note(
                axis,
                f"{fraction:.0%} in the top {100 * needed:.2g} %",
                (100 * needed, 100 * fraction),
                (6, -9) if right else (-6, 3),
                ha="left" if right else "right",
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
    figure.caption = caption(
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
    figure, (axis,) = titled_panels(groups[:1], narrow)
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
    figure.caption = caption(
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
def figure_8(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """How many classes occur how often (Figure 8)."""
    figure, axes = titled_panels(groups, narrow)
    figure.name, figure.title = "Figure 8", "How often the entries of the vocabulary occur"
    said = []
    for axis, group in zip(axes, groups, strict=True):
        sizes = group["bin_size"].values
        low, high = group["bin_low"].values, group["bin_high"].values
        drawn = {"color": COMMON, "alpha": 0.85, "edgecolor": GRID, "linewidth": 0.6}
        axis.bar(low, sizes, width=(high - low) * 1.0, align="edge", **drawn)
        count_axis(axis, float(high.max()))
        axis.set_yscale("log")
        axis.set_ylim(0.7, sizes.max() * 2.4)
        axis.yaxis.set_major_formatter(plain_number)
        axis.minorticks_off()
        for left, right, size in zip(low, high, sizes, strict=True):
            if size:
                place = math.sqrt(left * right), size * 1.12
                axis.text(*place, f"{size:,}", ha="center", va="bottom", fontsize=8, color=INK)
        never = int(group.attrs["never_occurring"])
        axis.set_xlabel(f"training count ({never:,} of {group.sizes['class']:,} never occur)")
        said.append(
            ", ".join(
                f"{size:,} tokens occur {bin_range(group, place)} times"
                for place, size in enumerate(sizes)
                if size
            )
        )
    axes[0].set_ylabel("entries of the vocabulary")
    figure.caption = caption(
        "Vocabulary entries by next-token count in the training set, in bins of powers of 3.",
        groups,
        runs=False,
    )
    figure.alt = "Histogram: " + "; ".join(said)
    return figure
