"""The page's first figure: paradox, theory and repair of one model."""

from __future__ import annotations

import xarray as xr

from reports.excess import decays_with_excess
from reports.figures.decay import loss_lines, repair_panel
from reports.figures.panels import caption, decay_panels, highest_bin, styled
from reports.figures.theory import MARKS, excess_axes, excess_panel
from reports.groups import weight_decays
from reports.style import INK, ReportFigure, decay_colours, loss_axis
from reports.tables import comparisons


@styled
def glance(*groups: xr.Dataset, narrow: bool = False) -> ReportFigure:
    """Paradox, theory and (where the groups hold one) repair of one model, side by side.

    The model is the first that is repaired, else the first; repair is at the strongest weight decay
    that has one, theory at the strongest with a run at decay 0 to compare with.
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
    paired = max(decays_with_excess(group), default=None)
    colour = decay_colours(weight_decays([group])).get(paired or decay, INK)
    cells = [(group, paired)] if paired else []
    excess_axes(axes[1], [group], cells)
    said = [losses, excess_panel(axes[1], group, paired, colour)]
    if found:
        said += repair_panel(axes[2], family, decay)
        loss_axis(axes[2], 12 * highest_bin(family))
    theory = "Theory" if paired is None else f"Theory, λ = {paired:g}"
    titles = ("Paradox", theory, f"Repair, λ = {decay:g}")
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title)
    name = group.attrs["name"]
    figure.name, figure.title = "At a glance", f"{name}: what happens, why, and what helps"
    repaired = " Repair: each token's loss weighted by its count to the power −g." if found else ""
    figure.caption = caption(
        "Paradox: the average hides what the rare tokens pay, which shows where every entry of the "
        f"vocabulary counts once. Theory. {MARKS}{repaired}",
        [group],
    )
    figure.alt = f"Paradox, theory and repair. {name}: " + "; ".join(said)
    return figure
