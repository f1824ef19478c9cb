"""The tables as people read them: text, rounded, one body a group; for the page and for LaTeX."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import xarray as xr

from reports import tables
from reports.groups import has_windows
from reports.last_layers import MEASURES
from reports.published import published_table_1
from reports.wording import worded
from ufm.verification import verify


@dataclass(frozen=True, kw_only=True)
class TableView:
    """A table of text: `bodies` are (heading, rows), and a row's first cell is its header."""

    key: str
    title: str
    caption: str
    head: Sequence[str]
    bodies: Sequence[tuple[str, Sequence[Sequence[str]]]]


def table_views(groups: Sequence[xr.Dataset]) -> list[TableView]:
    """Every table of the page."""
    if not groups:
        return []
    seeds = "Mean over seeds ± standard deviation where there is more than one seed."
    views = [
        TableView(
            key="table-1",
            title="Table 1: training loss and per-token metrics by weight decay",
            caption=f"At the end of training, over the training set. {seeds}",
            **_by_decay(tables.table_1(*groups), "metric", _mean_std),
        ),
        TableView(
            key="table-bins",
            title="Loss by how often a token occurs",
            caption=f"Mean cross-entropy in nats of the tokens in each frequency bin. {seeds}",
            **_by_decay(
                tables.loss_by_bin(*groups).query("tokens > 0"),
                "count",
                _mean_std,
                {"tokens": ("tokens", "{:,}"), "share_of_text": ("of the text", "{:.1%}")},
            ),
        ),
        *_speed_views([group for group in groups if has_windows(group)], seeds),
        TableView(
            key="table-gap",
            title="Fairness gap",
            caption="Loss of the rarest bin minus loss of the most frequent bin, in nats, with its "
            "95 % interval: over seeds where there is more than one, else over the tokens of "
            "both bins.",
            **_by_decay(
                tables.fairness_gap(*groups).assign(what="gap (nats)"), "what", _mean_interval
            ),
        ),
        theory_view(groups),
    ]
    published = published_table_1(*groups)
    if len(published):
        views.insert(1, _published_view(published))
    repaired = tables.repair(*groups)
    if len(repaired):
        views.append(_repair_view(repaired))
    return [_reworded(view, groups) for view in views]


def image_views(groups: Sequence[xr.Dataset]) -> list[TableView]:
    """The tables of test accuracy and of the last layer that these groups have the data for."""
    views = (falls_view(groups), difficulty_view(groups), geometry_view(groups))
    return [view for view in views if view]


def falls_view(groups: Sequence[xr.Dataset]) -> TableView | None:
    """Figure 9's two claims in numbers: which classes fall first, and whether all fall alike."""

    def cells(row: Any) -> list[str]:
        columns = ("rare", "frequent", "difference")
        falls = [_points(getattr(row, c), getattr(row, f"{c}_half_width")) for c in columns]
        return [f"{row.weight_decay:g}", *falls, f"{row.least:.1f} to {row.most:.1f}"]

    return view_of_runs(
        tables.class_falls(*groups),
        cells,
        key="table-falls",
        title="Images: how far test accuracy falls",
        caption="Percentage points below the smallest weight decay, mean over seeds ± 95 % "
        "interval, paired by seed. Where all classes have as many images, the first three and the "
        "last three stand for the rarest and the most frequent.",
        head=["λ", "3 rarest", "3 most frequent", "difference", "of any class"],
    )


def difficulty_view(groups: Sequence[xr.Dataset]) -> TableView | None:
    """`tables.difficulty` as text; None without shuffled runs."""
    return view_of_runs(
        tables.difficulty(*groups),
        lambda row: [f"{row.weight_decay:g}", f"{row.by_rank:.2f}", f"{row.by_class:.2f}"],
        key="table-difficulty",
        title="Images: frequency or difficulty",
        caption="Where the seed chose which class has which count: how much of the spread of all "
        "test accuracies goes with the rank in count, and how much with which class it is "
        "(adjusted R² of the means over seeds; about 0 by chance).",
        head=["λ", "rank in count", "class"],
    )


def geometry_view(groups: Sequence[xr.Dataset]) -> TableView | None:
    """`tables.geometry` as text; None without a last layer."""

    def cells(row: Any) -> list[str]:
        return [
            f"{row.weight_decay:g}",
            *(_number(getattr(row, m), getattr(row, f"{m}_std")) for m in MEASURES),
        ]

    return view_of_runs(
        tables.geometry(*groups),
        cells,
        key="table-geometry",
        title="Images: how far the last layer has collapsed",
        caption="On the training images at the end. NC1: spread within classes over spread between "
        "them, every class alike. NC2: std over mean of the norms of the class means, and std of "
        "their cosines once centred. NC3: distance of the classifiers from the centred class "
        "means, both at norm 1. All are 0 at neural collapse of balanced classes. Cosine: "
        "mean over pairs of the classifiers of three classes, 1 at minority collapse and "
        "−1/(V − 1) on a simplex; where counts are equal, of the first and the last three "
        "classes. Mean ± standard deviation over seeds.",
        head=["λ", *MEASURES.values()],
    )


def view_of_runs(
    frame: pd.DataFrame,
    cells: Callable[[Any], list[str]],
    heading: Callable[[Any, pd.DataFrame], str] = lambda name, part: (
        f"{name} (n = {part['n'].min()})"
    ),
    **view: Any,
) -> TableView | None:
    """A body for each group of runs, which its heading counts; None for an empty frame."""
    if not len(frame):
        return None
    return TableView(bodies=_bodies(frame, cells, heading=heading), **view)


def _bodies(
    frame: pd.DataFrame,
    cells: Callable[[Any], list[str]],
    by: str | list[str] = "runs",
    heading: Callable[[Any, pd.DataFrame], str] = lambda name, part: str(name),
    *,
    sort: bool = False,
) -> list[tuple[str, list[list[str]]]]:
    """A body for each value of `by`, with the cells of each of its rows."""
    return [
        (heading(name, part), [cells(row) for row in part.itertuples()])
        for name, part in frame.groupby(by, sort=sort)
    ]


def theory_view(groups: Sequence[xr.Dataset], *, of_images: bool = False) -> TableView:
    """`tables.theory` as text."""

    def cells(row: Any) -> list[str]:
        return [
            f"{row.weight_decay:g}",
            str(row.n),
            _number(row.critical_count, form=".4g"),
            _number(row.r_squared),
            _number(row.predicted_neglected, form=",.0f"),
            _number(row.neglected, form=",.0f"),
        ]

    view = TableView(
        key="table-image-theory" if of_images else "table-theory",
        title=f"{'Images: l' if of_images else 'L'}aw of exact minima, features decayed per sample",
        caption="loss = −log(1 − (1 − 1/V)·√(n_c/n)), flat at log V for n ≤ n_c, against whole "
        "losses, the floor included; it is no law of trained networks. n_c is the one number "
        "fitted to a run's losses. In the theory a token with "
        "count ≤ n_c stays at chance; measured are the tokens that the model never predicts right. "
        "R² is over tokens, each weighed by its count, in the chance of a miss 1 − exp(−loss).",
        head=["λ", "runs", "n_c", "R²", "neglected, predicted", "neglected, measured"],
        bodies=_bodies(tables.theory(*groups), cells),
    )
    return _reworded(view, groups)


def _repair_view(frame: pd.DataFrame) -> TableView:
    names = ("average_loss", "predicted_average", "token_balanced_loss", "predicted_balanced")

    def cells(row: Any) -> list[str]:
        return [
            f"g = {row.loss_weight_exponent:g}, decay on {row.decay}",
            str(row.n),
            *(_number(getattr(row, name)) for name in (*names, "fairness_gap")),
        ]

    return TableView(
        key="table-repair",
        title="Repair: what loss weights and spared parameters change",
        caption="Each token's loss is weighted by count^−g. Predicted: the corrected "
        "theory with the n_c fitted at g = 0 and the same weight decay, nothing refitted.",
        head=["repair", "runs", "average", "predicted", "token-balanced", "predicted", "gap"],
        bodies=_bodies(
            frame,
            cells,
            ["family", "weight_decay"],
            lambda key, part: f"{key[0]} at weight decay {key[1]:g}",
            sort=True,
        ),
    )


def _points(mean: float, half_width: float) -> str:
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.1f} ± {half_width:.1f}" if math.isfinite(half_width) else f"{mean:.1f}"


@functools.cache
def verdict_view() -> TableView:
    """The paper's claims about the theory: printed, corrected, and both errors as measured now."""
    rows = [
        [
            claim.name,
            claim.where,
            claim.printed,
            claim.corrected,
            _error(claim.printed_error),
            _error(claim.corrected_error),
            claim.verdict,
        ]
        for claim in verify()
    ]
    return TableView(
        key="table-verdict",
        title="The theory as printed, and as it is",
        caption="Each formula of the paper against certified numerical solutions that know neither "
        "form, computed while this page was built (python -m ufm verify): relative errors, or "
        "counterexamples found. lW and lH are the weight decays of classifier and features, l both "
        "where they are equal; n_k the samples of class k, N of all, V the classes.",
        head=[
            "claim",
            "where",
            "as printed",
            "corrected",
            "error, printed",
            "error, corrected",
            "verdict",
        ],
        bodies=[("Unconstrained features model, Section 5 and Appendix A", rows)],
    )


def _error(value: float) -> str:
    return f"{value:.3g}" if value > 1e-9 else "0" if value == 0 else "< 1e-9"


def _reworded(view: TableView, groups: Sequence[xr.Dataset]) -> TableView:
    return dataclasses.replace(
        view,
        title=worded(view.title, groups),
        caption=worded(view.caption, groups),
        head=[worded(cell, groups) for cell in view.head],
        bodies=[
            (heading, [[worded(row[0], groups), *row[1:]] for row in rows])
            for heading, rows in view.bodies
        ],
    )


def comparison_view(frame: pd.DataFrame, first: str, second: str) -> TableView:
    """`tables.comparison` as text."""

    def cells(row: Any) -> list[str]:
        return [
            row.metric,
            f"{row.weight_decay:g}",
            _number(row.first),
            _number(row.second),
            _number(row.difference, row.half_width, "+.3f"),
        ]

    return TableView(
        key="table-comparison",
        title=f"{first} beside {second}",
        caption="Means over seeds at equal weight decay; the difference is second minus first, "
        "with its 95 % interval over seeds where both have more than one.",
        head=["", "λ", first, second, "difference"],
        bodies=_bodies(frame, cells),
    )


def _published_view(frame: pd.DataFrame) -> TableView:
    def cells(row: Any) -> list[str]:
        return [
            f"λ = {row.weight_decay:g}",
            _number(row.published, row.published_std),
            _number(row.mean, row.std),
            str(row.n),
            _number(row.difference, form="+.3f"),
            _number(row.predicted, form=".3f"),
        ]

    return TableView(
        key="table-published",
        title="Table 1 beside the paper's",
        caption="The paper's own setting (OpenELM 270M on IMDB): its printed mean ± standard "
        "deviation, ours, and ours minus the paper's. Predicted: the paper's token-balanced loss, "
        "by the margin law from its first two columns alone.",
        head=["", "published", "measured", "runs", "difference", "predicted"],
        bodies=_bodies(frame, cells, ["runs", "metric"], lambda key, part: f"{key[1]} ({key[0]})"),
    )


def _by_decay(
    frame: pd.DataFrame,
    row: str,
    cell: Callable[[Any], str],
    extra: dict[str, tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Head and bodies of a table with weight decay across and `row` down, a body a group."""
    extra = extra or {}
    decays = sorted(frame["weight_decay"].unique())
    bodies = []
    for name, part in frame.groupby("runs", sort=False):
        rows = []
        for header, cells in part.groupby(row, sort=False):
            found = {entry.weight_decay: cell(entry) for entry in cells.itertuples()}
            shown = [form.format(cells[column].iloc[0]) for column, (_, form) in extra.items()]
            rows.append([str(header), *shown, *(found.get(decay, "") for decay in decays)])
        numbers = part.groupby("weight_decay")["n"].max()
        said = f"{numbers.min()}" if numbers.nunique() == 1 else f"{numbers.min()}–{numbers.max()}"
        bodies.append((f"{name} (n = {said})", rows))
    head = [
        "times seen" if row == "count" else "",
        *(title for title, _ in extra.values()),
        *(f"λ = {decay:g}" for decay in decays),
    ]
    return {"head": head, "bodies": bodies}


def _speed_views(groups: Sequence[xr.Dataset], seeds: str) -> list[TableView]:
    """The table of learning speeds, where any are known."""
    if not groups:
        return []
    return [
        TableView(
            key="table-speed",
            title="Learning speed by how often a token occurs",
            caption="S = 1 − AUC/T, mean over the tokens of each frequency bin. In a window that "
            "did not see a token, its loss is the last one seen; in brackets, where it differs, S "
            "with the next one seen instead: how much of a bin's slowness may be absence. Windows: "
            f"the share of the windows that saw a token of the bin. {seeds}",
            **_by_decay(
                tables.speed_by_bin(*groups).query("tokens > 0"),
                "count",
                _speed_range,
                {"windows_seen": ("windows", "{:.0%}")},
            ),
        )
    ]


def _mean_std(entry: Any) -> str:
    return _number(entry.mean, entry.std)


def _speed_range(entry: Any) -> str:
    back = _number(entry.carried_back)
    shown = _mean_std(entry)
    return shown if back == _number(entry.mean) else f"{shown} ({back})"


def _mean_interval(entry: Any) -> str:
    over_seeds = math.isfinite(entry.half_width)
    return _number(entry.mean, entry.half_width if over_seeds else entry.half_width_over_tokens)


def _number(value: float, spread: float = math.nan, form: str = ".3f") -> str:
    """A number, ± its spread where there is one."""
    if not math.isfinite(value):
        return "–"
    shown = f"{value:{form}}"
    return f"{shown} ± {spread:.3f}" if math.isfinite(spread) else shown


def run_table(
    groups: Sequence[xr.Dataset], manifests: Mapping[str, Mapping[str, Any]]
) -> TableView | None:
    """Every run on a row, with the time its manifest says it took; None without runs."""
    if not groups:
        return None

    def cells(row: Any) -> list[str]:
        return [
            row.run,
            f"{row.weight_decay:g}",
            str(row.seed),
            _number(row.average_loss),
            _number(row.token_balanced_loss),
            _number(row.fairness_gap, row.fairness_gap_half_width),
            _number(row.critical_count, form=".4g"),
            _number(row.r_squared),
            _seconds(manifests[row.run]),
        ]

    return TableView(
        key="table-runs",
        title="Every run",
        caption="Losses in nats; the gap with its 95 % interval over the tokens of both bins "
        "(none where a bin holds a single token).",
        head=["run", "λ", "seed", "average", "token-balanced", "fairness gap", "n_c", "R²", "time"],
        bodies=_bodies(tables.runs(*groups), cells),
    )


def _seconds(manifest: Any) -> str:
    try:
        taken = pd.Timestamp(manifest["finished"]) - pd.Timestamp(manifest["started"])
        return f"{taken.total_seconds():,.0f} s"
    except (KeyError, ValueError, TypeError):
        return "–"
