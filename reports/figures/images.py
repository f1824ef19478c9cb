"""Classes of images: their test accuracy (Figure 9), and the norms of the last layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from reports.figures.panels import caption, decay_key, draw_band, ends, styled, titled_panels
from reports.groups import display_label, over_seeds, weight_decays
from reports.last_layers import NORMS
from reports.ranks import rank_and_class
from reports.style import ReportFigure, decay_colours


@styled
def figure_9(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Test accuracy of each class, the rarest first, one line a weight decay (Figure 9).

    Shuffled runs are drawn by rank in count, then by class.
    """
    views = [(view, "test_accuracy") for group in groups for view in rank_and_class(group)]
    figure, axes, said = _by_class(views, narrow, scale=100, unit=" %")
    figure.name, figure.title = "Figure 9", "Test accuracy of each class"
    axes[0].set_ylim(0, 103)
    axes[0].set_ylabel("test accuracy (%)")
    figure.caption = caption(
        "Accuracy on the test set after the last step, classes in order of their training count "
        "(in brackets); where the seed chose which class has which count, by rank in count and, "
        "over the same runs, by class.",
        groups,
    )
    figure.alt = f"Test accuracy by class, the rarest first. {said}"
    return figure


@styled
def last_layer(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Norms of the class means and of the classifiers by class, a panel each for every group."""
    views = [
        (group.assign_attrs(name=f"{group.attrs['name']}: {NORMS[name]}"), name)
        for group in groups
        for name in NORMS
    ]
    figure, axes, said = _by_class(views, narrow)
    figure.name, figure.title = "Last layer", "Norms of class means and classifiers"
    axes[0].set_ylim(0, None)
    axes[0].set_ylabel("norm over the mean norm")
    figure.caption = caption(
        "Length of a class's mean feature, less the global mean, and of its row of the classifier, "
        "each over the mean of all classes: 1 everywhere on the balanced simplex. Classes in order "
        "of their training count (in brackets).",
        groups,
    )
    figure.alt = f"Norms by class, the rarest first, over their mean. {said}"
    return figure


def _by_class(
    views: Sequence[tuple[xr.Dataset, str]], narrow: bool, *, scale: float = 1.0, unit: str = ""
) -> tuple[ReportFigure, list[Axes], str]:
    """A variable of each group by class, the rarest first, a line a weight decay; and in words."""
    groups = [group for group, _ in views]
    figure, axes = titled_panels(groups, narrow, height=3.4, sharex=False)
    decays = weight_decays(groups)
    colours = decay_colours(decays)
    said = []
    for axis, (group, name) in zip(axes, views, strict=True):
        names, order = _named_by_count(group)
        band = scale * over_seeds(group, name)[["mean", "half_width"]].isel({"class": order})
        for decay in band["weight_decay"].values:
            at = band.sel(weight_decay=decay)
            draw_band(axis, np.arange(len(order)), at, colours[float(decay)])
        axis.set_xticks(range(len(order)), names, rotation=45, ha="right", rotation_mode="anchor")
        rarest = ends(band["mean"].isel({"class": 0}), unit=unit)
        said.append(f"{group.attrs['name']}: {names[0]} {rarest}")
    decay_key(figure, decays)
    return figure, axes, "; ".join(said)


def _named_by_count(group: xr.Dataset) -> tuple[list[str], np.ndarray]:
    """Names of the classes with their counts, the rarest first, and their places; without counts
    as they are."""
    labels = [display_label(str(label)) for label in group["label"].values]
    if "class_count" not in group.coords:
        return labels, np.arange(len(labels))
    counts = group["class_count"].values
    order = np.argsort(counts, kind="stable")
    return [f"{labels[place]} ({counts[place]:,})" for place in order], order
