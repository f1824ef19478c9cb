"""How every figure looks: type, ink, and colours that survive colour blindness and dark mode.

A figure is drawn in the light theme. Each colour has a name and a dark twin, so that a page can
swap them without drawing again (`reports.page`).
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

INK, MUTED, GRID = "#1c2126", "#5a646e", "#dfe3e8"
COMMON, RARE = "#0b6aa8", "#c8500a"  # Okabe and Ito's blue and vermilion, darkened to 4.5:1
CLOUD = "#808a94"  # the one colour that is rasterised: it must do on both backgrounds

DARK = {INK: "#e8eaed", MUTED: "#a3adb7", GRID: "#30363d", COMMON: "#62b6ec", RARE: "#f59a4d"}

STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "figure.dpi": 100.0,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "text.parse_math": False,  # names and tokens come from data: a $ is a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "pdf.fonttype": 42,
    "savefig.transparent": True,
}


class ReportFigure(Figure):
    """A figure that knows its name (such as "Figure 4"), title, caption and text alternative."""

    name: str = ""
    title: str = ""
    caption: str = ""
    alt: str = ""

    def settle(self) -> None:
        """Lay the figure out for good: each file of it would else be drawn once more, to do so."""
        if engine := self.get_layout_engine():
            self.set_dpi(72)  # that of an SVG and of a PDF
            engine.execute(self)
            self.set_layout_engine(None)

    def drawn(
        self, format: str, *, dpi: int, salt: str, text: str = "path", **options: Any
    ) -> bytes:
        """The figure as a file of a format, the same bytes every time.

        `salt` tells the ids of one SVG from those of another; `text`: an SVG's as "path" or "none".
        """
        buffer = io.BytesIO()
        style = STYLE | {"svg.hashsalt": salt, "svg.fonttype": text}
        with matplotlib.rc_context(style), missing_glyphs_allowed():
            self.settle()
            self.savefig(buffer, format=format, dpi=dpi, **options)
        return buffer.getvalue()


@contextlib.contextmanager
def missing_glyphs_allowed() -> Iterator[None]:
    """Draw class names in any script: what the font of this machine lacks is shown as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def decay_colours(decays: Sequence[float]) -> dict[float, str]:
    """A colour for each weight decay: the larger, the further from the paper's white."""
    return dict(zip(decays, _ramp(0.68, 0.02, len(decays)), strict=True))


def dark_decay_colours(decays: Sequence[float]) -> dict[float, str]:
    """The twins of `decay_colours` for a dark background: the larger, the lighter."""
    return dict(zip(decays, _ramp(0.40, 1.0, len(decays)), strict=True))


def plain_number(value: float, _position: int | None = None) -> str:
    """A number as people write it: 0.001, 0.5, 1, 1,000."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


def count_axis(axis: Axes, highest: float, *, base: int = 3) -> None:
    """A logarithmic axis of training counts, with as many powers of `base` as fit its panel."""
    axis.set_xscale("log", base=base)
    axis.set_xlabel("training count (log scale)")
    grid = axis.get_gridspec()
    assert grid is not None
    powers = 1
    while base**powers < highest:
        powers += 1
    widest = 0.12 + 0.075 * len(plain_number(base**powers))  # inches of a label and a space
    width = axis.get_figure(root=True).get_figwidth() / grid.ncols
    room = max(3, int(width * min(2.25, 1 / widest)))
    stride = -(-(powers + 1) // room)
    axis.set_xticks([float(base**power) for power in range(0, powers + 1, stride)])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_xlim(0.8, base**powers * 1.25)


def loss_axis(axis: Axes, highest: float) -> None:
    """A symlog axis from 0 nats (the paper's Figure 6): linear to 0.1, logarithmic above."""
    axis.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    axis.set_ylim(0, max(highest * 1.25, 0.12))
    ticks = [0, 0.1, 0.3, 1, 3, 10, 30]
    axis.set_yticks([tick for tick in ticks if tick <= max(highest * 1.25, 0.12)])
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(plain_number))


def label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name (x, y, text, colour) at its right end, moved apart if they touch."""
    low, high = axis.get_ylim()
    gap = 0.15 * (high - low)
    ordered = sorted(ends, key=lambda end: end[1])
    places = [y for _, y, _, _ in ordered]
    for i in range(1, len(places)):
        overlap = gap - (places[i] - places[i - 1])
        if overlap > 0:
            down = min(overlap / 2, max(places[i - 1] - low - gap / 2, 0))
            places[i - 1] -= down
            places[i] += overlap - down
    for (x, _, text, colour), placed in zip(ordered, places, strict=True):
        style = {"fontweight": "bold", "linespacing": 1.05, "annotation_clip": False}
        note(axis, text, (x, placed), (6, 0), color=colour, va="center", **style)


def note(
    axis: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any
) -> None:
    """A text beside a point, `offset` in points from it."""
    style = {"color": INK, "fontsize": 8.5} | style
    axis.annotate(text, at, xytext=offset, textcoords="offset points", **style)


def _ramp(start: float, stop: float, number: int) -> list[str]:
    viridis = matplotlib.colormaps["viridis"]
    places = [stop] if number == 1 else np.linspace(start, stop, number)
    return [matplotlib.colors.to_hex(viridis(place)) for place in places]
