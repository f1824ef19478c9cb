"""Every figure of a fixed small study looks as it did when it was last looked at.

After a change that is meant to be seen, look at the new images and keep them:

    python -m reports.tests.test_images
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib import font_manager, ft2font
from PIL import Image

from reports import figures
from reports.page import CORPUS_FIGURES, FIGURES
from reports.reading import Collection, collect
from reports.style import ReportFigure, missing_glyphs_allowed
from reports.tests.studies import make_study

BASELINE = Path(__file__).parent / "baseline"
DRAWN_BY = BASELINE / "drawn_by.txt"
DRAWN = (figures.glance, *FIGURES, *CORPUS_FIGURES)
# Of the full range; blocks of 4 x 4 pixels, so that another rasteriser's edges do not count.
MEAN_TOLERANCE, BLOCK_TOLERANCE, BLOCKS_OFF = 0.01, 0.25, 0.01


def looks(figure: ReportFigure) -> np.ndarray:
    """The figure in shades of grey on white, (height, width) in 0..1."""
    buffer = io.BytesIO()
    with missing_glyphs_allowed():
        figure.savefig(buffer, format="png", dpi=60, facecolor="white", transparent=False)
    return np.asarray(Image.open(buffer).convert("L"), dtype=np.float64) / 255


def differs(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two images differ by more than a rasteriser's whims."""
    if np.abs(np.subtract(one.shape, other.shape)).max() > 4:
        return True
    height, width = (4 * (min(sizes) // 4) for sizes in zip(one.shape, other.shape, strict=True))
    blocks = [
        image[:height, :width].reshape(height // 4, 4, width // 4, 4).mean(axis=(1, 3))
        for image in (one, other)
    ]
    apart = np.abs(blocks[0] - blocks[1])
    return bool(apart.mean() > MEAN_TOLERANCE or (apart > BLOCK_TOLERANCE).mean() > BLOCKS_OFF)


def drawn_by() -> str:
    """What the look of text depends on: matplotlib (another width before 3.11), FreeType, fonts."""
    font = ft2font.FT2Font(font_manager.findfont(font_manager.FontProperties()))
    freetype = ft2font.__freetype_version__
    return f"matplotlib {matplotlib.__version__}, FreeType {freetype}, {font.postscript_name}"


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
def test_figure_looks_as_before(draw: Callable[..., ReportFigure], collection: Collection) -> None:
    baseline = np.asarray(Image.open(BASELINE / f"{draw.__name__}.png"), dtype=np.float64) / 255
    if differs(looks(draw(*collection.groups)), baseline):
        pytest.fail(
            f"{draw.__name__} does not look like its image. The images depend on the versions of "
            "matplotlib and FreeType and on the font: they were drawn by "
            f"{DRAWN_BY.read_text().strip()}, and here is {drawn_by()}. If these are alike, the "
            "figure has changed."
        )


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (figures.figure_4, "token_balanced_loss"),
        (figures.figure_7a, "bin_loss"),
        (figures.figure_7b, "bin_learning_speed"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_changed_number_is_seen(
    draw: Callable[..., ReportFigure], name: str, collection: Collection
) -> None:
    changed = [_halved(group, name) for group in collection.groups]
    assert differs(looks(draw(*changed)), looks(draw(*collection.groups)))


def _halved(group: xr.Dataset, name: str) -> xr.Dataset:
    return group.assign({name: group[name] * 0.5})


def _keep() -> None:
    with tempfile.TemporaryDirectory() as folder:
        groups = collect(
            [
                make_study(
                    Path(folder) / "study",
                    weight_decays=(0.0, 0.3, 1.0),
                    seeds=(0, 1),
                    models=("openelm-tiny", "qwen2-tiny"),
                )
            ]
        ).groups
    BASELINE.mkdir(exist_ok=True)
    DRAWN_BY.write_text(f"{drawn_by()}\n")
    for draw in DRAWN:
        image = Image.fromarray((255 * looks(draw(*groups))).round().astype(np.uint8))
        image.quantize(16).convert("L").save(BASELINE / f"{draw.__name__}.png", optimize=True)


if __name__ == "__main__":
    _keep()
