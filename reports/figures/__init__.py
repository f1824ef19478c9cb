"""The paper's figures, one function each, from the labelled datasets of `reports.groups`.

Every function takes one or more groups of comparable runs and draws one panel for each, on shared
axes. `narrow` stacks the panels for a phone. Lines are means over seeds, bands are 95 % Student-t
intervals over seeds; a single seed has no band. All are drawn on the object-oriented interface:
no pyplot, no global state.
"""

from reports.figures.alternatives import alternatives, new_text
from reports.figures.corpus import figure_2, figure_3a, figure_3b, figure_8
from reports.figures.decay import figure_1, figure_4, repair
from reports.figures.glance import glance
from reports.figures.images import figure_9, last_layer
from reports.figures.theory import (
    critical_count,
    predictions,
    theory_over_images,
    theory_over_losses,
)
from reports.figures.tokens import figure_5, figure_6a, figure_6b, figure_7a, figure_7b

__all__ = [
    "alternatives",
    "new_text",
    "glance",
    "figure_1",
    "figure_2",
    "figure_3a",
    "figure_3b",
    "figure_4",
    "figure_5",
    "figure_6a",
    "figure_6b",
    "figure_7a",
    "figure_7b",
    "figure_8",
    "figure_9",
    "repair",
    "last_layer",
    "theory_over_losses",
    "theory_over_images",
    "predictions",
    "critical_count",
]
