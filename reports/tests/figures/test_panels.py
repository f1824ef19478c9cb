"""Figures draw the data they are given, whatever of it there is."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reports import figures
from reports.page import CORPUS_FIGURES, FIGURES, _theme, drawings, inline_svg
from reports.reading import Collection, collect
from reports.style import COMMON, DARK, RARE, ReportFigure, dark_decay_colours, decay_colours
from reports.tests.studies import make_run, zipf_counts
from run_store import class_record, publish

EVERY = (*FIGURES, *CORPUS_FIGURES)


@pytest.mark.parametrize("draw", EVERY, ids=lambda draw: draw.__name__)
def test_every_figure_says_what_was_run(
    draw: Callable[..., ReportFigure], collection: Collection
) -> None:
    figure = draw(*collection.groups)
    figure.savefig(io.BytesIO(), format="pdf")
    assert figure.name
    assert figure.title
    assert figure.alt
    assert "python-docs" in figure.caption
    assert "V = 300" in figure.caption
    if draw not in CORPUS_FIGURES:
        assert "openelm-tiny and qwen2-tiny on" in figure.caption
        assert "2,000 steps" in figure.caption
        assert "seeds 0, 1 (n = 2 per weight decay)" in figure.caption


@pytest.mark.parametrize("draw", EVERY, ids=lambda draw: draw.__name__)
def test_a_single_run_is_drawn(draw: Callable[..., ReportFigure], tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.5, seed=3, steps=1, corpus="$a_b$ <i>")
    (group,) = collect([tmp_path]).groups
    figure = draw(group, narrow=True)
    figure.savefig(io.BytesIO(), format="svg")
    assert "$a_b$" in figure.caption


def test_figure_4_draws_both_losses(collection: Collection) -> None:
    group = collection.groups[0]
    balanced, average = figures.figure_4(group).axes[0].lines
    assert (balanced.get_color(), average.get_color()) == (RARE, COMMON)
    for line, name in ((balanced, "token_balanced_loss"), (average, "average_loss")):
        means = group[name].groupby("weight_decay").mean()
        np.testing.assert_allclose(line.get_xdata(), means["weight_decay"].values)
        np.testing.assert_allclose(line.get_ydata(), means.values)


def test_glance_sets_damage_law_and_repair_side_by_side(tmp_path: Path) -> None:
    for weight_decay, exponent in ((0.0, 0), (0.5, 0), (0.5, 0.25), (1.0, 0)):
        make_run(
            tmp_path, weight_decay=weight_decay, seed=0, critical_count=2.0,
            loss_weight_exponent=exponent,
        )  # fmt: skip
    groups = collect([tmp_path]).groups
    draw, shown = drawings(groups)[0]
    assert draw is figures.glance
    paradox, theory, repair = draw(*shown, narrow=True).axes
    plain, weighted = shown
    assert plain.attrs["name"] == "openelm-tiny"
    for line, name in zip(paradox.lines, ("token_balanced_loss", "average_loss"), strict=True):
        np.testing.assert_allclose(line.get_ydata(), plain[name].values)
    # Law and repair at 0.5, the strongest decay that both have.
    _, law = theory.lines
    fitted, V = float(plain["critical_count"][1]), plain.sizes["class"]
    miss = (1 - 1 / V) * np.minimum(1, np.sqrt(fitted / law.get_xdata()))
    np.testing.assert_allclose(law.get_ydata(), -np.log1p(-miss))
    for line, loss in zip(
        repair.lines, (plain["bin_loss"][1], weighted["bin_loss"][0]), strict=True
    ):
        np.testing.assert_allclose(line.get_ydata(), loss.values[np.isfinite(loss.values)])


def test_repairs_are_drawn_where_two_share_a_weight_decay(tmp_path: Path) -> None:
    make_run(tmp_path, weight_decay=0.0, seed=0)
    make_run(tmp_path, weight_decay=1.0, seed=0, loss_weight_exponent=0.25)
    assert figures.repair not in dict(drawings(collect([tmp_path]).groups))
    make_run(tmp_path, weight_decay=1.0, seed=0, loss_weight_exponent=0.5)
    shown = dict(drawings(collect([tmp_path]).groups))[figures.repair]
    (axis,) = figures.repair(*shown).axes
    assert axis.get_title("left") == f"{shown[0].attrs['name']}, weight decay 1"
    assert [str(line.get_label())[:8] for line in axis.lines] == ["g = 0.25", "g = 0.5:"]


@pytest.mark.parametrize("draw", [figures.figure_1, figures.figure_4, figures.critical_count])
def test_shared_axes_hold_every_panel(draw: Callable[..., ReportFigure], tmp_path: Path) -> None:
    for model, critical_count in (("a", 0.1), ("b", 20.0), ("c", 1.0)):
        for weight_decay in (0.0, 5e-4, 1.0):
            make_run(
                tmp_path, weight_decay=weight_decay, seed=0, model=model,
                critical_count=critical_count,
            )  # fmt: skip
    figure = draw(*collect([tmp_path]).groups)
    for axis in figure.axes:
        low, high = axis.get_ylim()
        assert low == 0
        assert all((line.get_ydata() <= high).all() for line in axis.lines)
        assert axis.get_xticks().tolist() == [0.0, 1.0]


def test_figure_1_draws_the_end_bins(collection: Collection) -> None:
    group = collection.groups[0]
    rare, common = figures.figure_1(group).axes[0].lines
    held = np.flatnonzero(group["bin_size"].values)
    for line, place in ((rare, held[0]), (common, held[-1])):
        means = group["bin_loss"][:, place].groupby("weight_decay").mean()
        np.testing.assert_allclose(line.get_ydata(), means.values)


def test_figure_7a_has_one_line_a_weight_decay(collection: Collection) -> None:
    axis = figures.figure_7a(collection.groups[0]).axes[0]
    assert axis.get_xscale() == "log"
    assert axis.get_yscale() == "symlog"
    assert len(axis.lines) == 3
    colours = decay_colours([0.0, 0.3, 1.0])
    assert [line.get_color() for line in axis.lines] == list(colours.values())


def test_figure_8_bars_are_the_bin_sizes(collection: Collection) -> None:
    group = collection.groups[0]
    bars = figures.figure_8(group).axes[0].patches
    assert [bar.get_height() for bar in bars] == group["bin_size"].values.tolist()
    assert [bar.get_x() for bar in bars] == group["bin_low"].values.tolist()


def test_figure_3a_ends_at_the_whole_text(collection: Collection) -> None:
    line = figures.figure_3a(collection.groups[0]).axes[0].lines[0]
    assert line.get_xdata()[-1] == pytest.approx(100)
    assert line.get_ydata()[-1] == pytest.approx(100)


def test_figure_2_colours_by_the_99th_percentile(collection: Collection) -> None:
    group = collection.groups[0]
    labels, counts = group["label"].values, group["class_count"].values
    threshold = np.percentile(counts[counts > 0], 99)
    tokens = [str(label) for label in labels[[0, 1, 8, 40, 200]]]
    figure = figures.figure_2(group, tokens)
    expected = [RARE if count < threshold else COMMON for count in counts[[0, 1, 8, 40, 200]]]
    assert [text.get_color() for text in figure.texts] == expected
    assert set(expected) == {RARE, COMMON}
    figure.savefig(io.BytesIO(), format="svg")
    with pytest.raises(ValueError, match="'absent' is not in the vocabulary"):
        figures.figure_2(group, ["absent"])


def test_figure_3b_is_the_share_outside_95_percent(tmp_path: Path) -> None:
    for vocab_size in (100, 400):
        make_run(tmp_path, weight_decay=0.0, seed=0, vocab_size=vocab_size)
    groups = collect([tmp_path]).groups
    assert figures.figure_3b in [draw for draw, _ in drawings(groups)]
    (line,) = figures.figure_3b(*groups).axes[0].lines
    assert line.get_xdata().tolist() == [100, 400]
    for share, vocab_size in zip(line.get_ydata(), (100, 400), strict=True):
        counts = np.sort(zipf_counts(vocab_size))[::-1]
        needed = int(np.argmax(np.cumsum(counts) >= 0.95 * counts.sum())) + 1
        assert share == pytest.approx(100 * (1 - needed / vocab_size))


def test_figure_9_shows_the_last_test_accuracy(tmp_path: Path) -> None:
    counts = np.array([50, 10, 400])
    for seed in (0, 1):
        run = make_run(tmp_path, weight_decay=0.1, seed=seed, status="running", model="resnet9")
        window = np.ones((2, 3), dtype=int)
        final = {"final_count": counts, "final_loss": [1.0, 2.0, 0.5]}
        tested = np.array([[0.1, 0.1, 0.1], [0.6, 0.2 + 0.1 * seed, 0.9]])
        data = class_record(
            steps=[1, 2], class_counts=counts, labels=["ship", "<b>", "猫"], count=window,
            loss=window * 1.0, accuracy=window * 0.5, final_accuracy=[0.5, 0.4, 0.9],
            test_count=window, test_accuracy=tested, **final,
        )  # fmt: skip
        publish(run, data)
    groups = collect([tmp_path]).groups
    assert drawings(groups)[0][0] is figures.figure_9
    figure = figures.figure_9(*groups)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [25.0, 60.0, 90.0])
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == ["<b> (10)", "ship (50)", "猫 (400)"]
    assert "猫" in inline_svg(figure, "nine", [0.1])


def test_colours_change_with_the_theme_and_ids_are_apart(collection: Collection) -> None:
    decays = [0.0, 0.3, 1.0]
    svg = inline_svg(figures.figure_7a(*collection.groups), "one", decays)
    assert "var(--wd0)" in svg
    assert "var(--wd2)" in svg
    for colour in _theme(decays):
        assert f": {colour}" not in svg
    assert 'id="one-' in svg
    assert "url(#one-" in svg
    assert "http://" not in svg.replace("http://www.w3.org/", "")


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast() -> None:
    """WCAG: 4.5 for text, 3 for the strong end of the ramp's lines; every decay told apart."""
    text = [colour for colour in DARK if colour != "#dfe3e8"]
    assert all(_contrast(colour, "#ffffff") >= 4.5 for colour in text)
    assert all(_contrast(DARK[colour], "#14171a") >= 4.5 for colour in text)
    decays = [0.0, 0.1, 0.3, 0.5, 1.0]
    for ramp, paper, least in (
        (decay_colours(decays), "#ffffff", 2.3),
        (dark_decay_colours(decays), "#14171a", 3.0),
    ):
        contrasts = [_contrast(colour, paper) for colour in ramp.values()]
        assert contrasts == sorted(contrasts)
        assert contrasts[0] >= least


def test_no_global_state_is_used() -> None:
    """pyplot is never imported, so a figure lives and dies with its last reference."""
    code = "import sys, reports.page; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
