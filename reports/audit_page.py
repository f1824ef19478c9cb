"""One page from the tokens that `python -m llm_experiments audit --out tokens.parquet` wrote."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from pyarrow import parquet

from frequency_bins import FrequencyBins, average_loss, token_balanced_loss
from llm_experiments.audit.result import by_frequency
from reports.figures.panels import grid, styled
from reports.page import TEMPLATES, colour_variables, inline_svg, template_environment
from reports.style import COMMON, RARE, ReportFigure, count_axis
from reports.table_views import TableView
from reports.token_search import pack_losses

_WHOLE, _REAL = ("id", "training_count", "count"), ("loss", "accuracy")
_MOST_ROWS = 2**22


def read_audit(path: Path) -> pd.DataFrame:
    """The tokens of an audit, with its name and tables in `attrs`.

    Raises:
        ValueError: the file is no parquet, or holds no such columns.
    """
    try:
        rows = parquet.ParquetFile(path).metadata.num_rows
        tokens = pd.read_parquet(path) if rows <= _MOST_ROWS else pd.DataFrame()
        whole = tokens[[*_WHOLE]].astype("int64")
        tokens = tokens.assign(**whole, **tokens[[*_REAL]].astype("float64"))
        tokens["token"] = tokens["token"].astype(str)
        if (whole < 0).any(axis=None) or not whole["training_count"].any():
            raise ValueError("counts are negative or all 0")
    except Exception as error:  # of many kinds, by what is wrong with the file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no audit's file of tokens: {reason:.200}") from None
    return tokens


def audit_page(tokens: pd.DataFrame) -> str:
    """The page as HTML: averages, loss by frequency, the audit's tables, token search."""
    name = str(tokens.attrs.get("audit", "a model"))
    counts, losses = tokens["count"].to_numpy(), tokens["loss"].to_numpy()
    average = float(average_loss(counts, losses))
    balanced = float(token_balanced_loss(counts, losses))
    others = [c for c in tokens if str(c).startswith(("loss_", "against_loss"))]
    columns = {"loss": losses} | {str(c): tokens[c].to_numpy(dtype=float) for c in others}
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    wide = loss_by_count(tokens)
    return (
        template_environment(())
        .get_template("audit.html")
        .render(
            name=name,
            answer=f"The average next token costs {average:.3f} nats, the average token of the "
            f"vocabulary, each once, {balanced:.3f}.",
            figure=wide,
            wide=inline_svg(wide, "audit-w", ()),
            narrow=inline_svg(loss_by_count(tokens, narrow=True), "audit-n", ()),
            tables=[*_tables(tokens.attrs.get("tables"))],
            search=pack_losses(
                name, tokens["token"].tolist(), tokens["training_count"].to_numpy(), columns
            ),
            style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
            colours=Markup(colour_variables(())),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


@styled
def loss_by_count(tokens: pd.DataFrame, narrow: bool = False) -> ReportFigure:
    """Mean loss of the tokens in each bin of training counts, beside that of another model."""
    figure, (axis,) = grid(1, 1, (3.6, 2.6) if narrow else (7.0, 2.9))
    series = [("loss", "this model", RARE)]
    if "against_loss" in tokens:
        series.append(("against_loss", "the other", COMMON))
    lows = FrequencyBins.powers(tokens["training_count"].to_numpy(), base=3).edges[:-1]
    middles = np.multiply(lows, np.sqrt(3))
    for column, label, colour in series:
        loss = by_frequency(tokens.assign(loss=tokens[column]))["loss"][: len(lows)]
        known = loss.notna()
        axis.plot(middles[known], loss[known], "o-", color=colour, label=label)
    count_axis(axis, float(tokens["training_count"].max()))
    axis.set_ylabel("mean loss, nats")
    if len(series) > 1:
        axis.legend()
    figure.name, figure.title = "Figure", "Loss by how often a token was trained on"
    figure.caption = "Mean over the tokens of each bin, powers of 3, each token once."
    figure.alt = figure.title
    return figure


def _tables(kept: Any) -> list[TableView]:
    """The audit's own tables; what is no table of text is left out."""
    views = []
    for place, table in enumerate(kept if isinstance(kept, list) else []):
        try:
            head, rows = [*map(str, table["head"])], [[*map(str, row)] for row in table["rows"]]
            bodies = [("all", rows)] if rows else []
            views.append(
                TableView(
                    key=f"audit-{place}",
                    title=str(table["title"]),
                    caption="",
                    head=head,
                    bodies=bodies,
                )
            )
        except (KeyError, TypeError):
            continue
    return views
