"""The page's first figure: paradox, theory and repair of one model."""

from __future__ import annotations

import xarray as xr

from reports.figures.decay import loss_lines, repair_panel
from reports.figures.panels import caption, decay_panels, highest_bin, highest_loss, styled
from reports.figures.theory import law_axes, law_panel, marks
from reports.groups import weight_decays
from reports.style import ReportFigure, decay_colours, loss_axis
from reports.tables import comparisons


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
    lines, losses = loss_lines(group)
    decay_panels(axes[:1], [lines])
    axes[0].set_ylabel("loss (nats)")
    colour = decay_colours(weight_decays([group]))[decay]
    said = [losses, law_panel(axes[1], group, decay, colour)]
    law_axes(axes[1], [group], highest_loss(group, decay))
    if found:
        said += repair_panel(axes[2], family, decay)
        loss_axis(axes[2], 12 * highest_bin(family))
    titles = ("Paradox", f"Theory, λ = {decay:g}", f"Repair, λ = {decay:g}")
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    name = group.attrs["name"]
    figure.name, figure.title = "At a glance", f"{name}: what happens, why, and what helps"
    repaired = " Repair: each token's loss weighted by its count to the power −g." if found else ""
    figure.caption = caption(
        "Paradox: the average hides what the rare tokens pay, which shows where every entry of the "
        "vocabulary counts once. Theory: the line is the law with its one fitted number n_c, made "
        "for exact minima under L2 decay; R² tells how well it fits. "
        f"{marks([group])}{repaired}",
        [group],
    )
    figure.alt = f"Paradox, theory and repair. {name}: " + "; ".join(said)
    return figure
