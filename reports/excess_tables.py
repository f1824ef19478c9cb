"""The law of the excess loss, and losses predicted by the margin law: as data and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from reports.excess import LAW, SYMBOLS, fitted_law, law_number, why_no_excess
from reports.groups import count_range
from reports.table_views import TableView
from reports.wording import worded


def excess_law(*groups: xr.Dataset) -> pd.DataFrame:
    """The saturating law by weight decay: A (nats), n_0, p and R² with standard errors.

    `pairs`: the seeds behind it; `preferred`: of three laws, the one that best predicts a bin that
    it was not fitted to; `note`: why there is no law. A group without decay has one row.
    """
    rows: list[dict[str, Any]] = []
    for group in groups:
        shared = {"runs": group.attrs["name"]}
        if not group.sizes["decayed"]:
            rows.append(shared | {"weight_decay": math.nan, "pairs": 0})
            rows[-1] |= {f"{name}{end}": math.nan for name in LAW for end in ("", "_error")}
            rows[-1] |= {"preferred": "", "note": why_no_excess(group)}
        for place, decay in enumerate(group["decayed"].values.tolist()):
            law, errors = fitted_law(group, decay)
            row = shared | {"weight_decay": decay, "pairs": int(group["pairs"][place])}
            row |= law | {f"{name}_error": value for name, value in errors.items()}
            row |= {"preferred": str(group["preferred"].values[place])}
            rows.append(row | {"note": str(group["excess_note"].values[place])})
    return pd.DataFrame(rows)


def predicted_losses(*groups: xr.Dataset) -> pd.DataFrame:
    """Mean losses of bins of factor 2, measured and predicted by both orders of the margin law.

    In nats, with relative errors. From the smallest weight decay, `predicted_from`, for every
    larger one. Empty where no run has a kappa, or none has a partner at decay 0.
    """
    rows: list[dict[str, Any]] = []
    for group in groups:
        lows, highs = (group[f"octave_{end}"].values.tolist() for end in ("low", "high"))
        for decay in group["decayed"].values.tolist():
            cell = group.sel(decayed=decay)
            for place in np.flatnonzero(np.isfinite(cell["measured"].values)):
                measured = float(cell["measured"][place])
                row = {"runs": group.attrs["name"], "weight_decay": decay}
                row |= {"predicted_from": float(group["predicted_from"])}
                row |= {"count": count_range(lows[place], highs[place]), "measured": measured}
                for order in ("first_order", "second_order"):
                    predicted = float(cell[order][place])
                    row |= {order: predicted, f"{order}_error": predicted / measured - 1}
                rows.append(row)
    return pd.DataFrame(rows)


def excess_views(groups: Sequence[xr.Dataset], *, of_images: bool = False) -> list[TableView]:
    """Both tables as text; that of predictions where there are any."""
    if not groups:
        return []
    views = [_law_view(groups, of_images), _prediction_view(groups, of_images)]
    return [view for view in views if view is not None]


def _law_view(groups: Sequence[xr.Dataset], of_images: bool) -> TableView:
    def cells(row: Any) -> list[str]:
        numbers = [law_number(getattr(row, n), getattr(row, f"{n}_error")) for n in SYMBOLS]
        r_squared = law_number(row.r_squared, row.r_squared_error, ".4f")
        if math.isfinite(row.r_squared) and not math.isfinite(row.r_squared_error):
            r_squared = f"{row.r_squared:.4f}"
        decay = f"{row.weight_decay:g}" if math.isfinite(row.weight_decay) else "–"
        return [decay, str(row.pairs), *numbers, r_squared, row.note or row.preferred or "–"]

    frame = excess_law(*groups)
    return TableView(
        key="table-image-excess" if of_images else "table-excess",
        title=f"{'Images: e' if of_images else 'E'}xcess law",
        caption=worded(
            "What weight decay adds to the loss at decay 0 of the same seed: A·(1 + n/n_0)^−p in "
            "nats for tokens seen n times, fitted to the log of its mean over the pairs of runs in "
            "bins of factor 2, ± standard errors (open: the record tells only a limit of the law). "
            "R² is over these bins. Preferred, by leaving each bin out in turn: this law "
            "(saturating), A·n^−q (exponent), or the law of exact minima (one number).",
            groups,
        ),
        head=["λ", "pairs", "A (nats)", "n_0", "p", "R²", "preferred law"],
        bodies=[
            (str(name), [cells(row) for row in part.itertuples()])
            for name, part in frame.groupby("runs", sort=False)
        ],
    )


def _prediction_view(groups: Sequence[xr.Dataset], of_images: bool) -> TableView | None:
    frame = predicted_losses(*groups)
    if not len(frame):
        return None

    def cells(row: Any) -> list[str]:
        shown = [row.count, f"{row.measured:.4f}"]
        for order in ("first_order", "second_order"):
            predicted, error = getattr(row, order), getattr(row, f"{order}_error")
            known = math.isfinite(predicted)
            shown += [f"{predicted:.4f}", f"{100 * error:+.1f}"] if known else ["–", "–"]
        return shown

    return TableView(
        key="table-image-predicted" if of_images else "table-predicted",
        title=f"{'Images: p' if of_images else 'P'}redicted and measured",
        caption=worded(
            "Mean loss in nats of the tokens in each bin of factor 2, and what the margin law "
            "predicts from the runs at decay 0 and at the smallest decay, of the same seeds: "
            "nothing is fitted to the runs that are predicted. –: the law says nothing of a loss "
            "that is no better than chance.",
            groups,
        ),
        head=["times seen", "measured", "first order", "error %", "second order", "error %"],
        bodies=[
            (
                f"{name}, λ = {decay:g} from λ = {start:g}",
                [cells(row) for row in part.itertuples()],
            )
            for (name, decay, start), part in frame.groupby(
                ["runs", "weight_decay", "predicted_from"], sort=False
            )
        ],
    )
