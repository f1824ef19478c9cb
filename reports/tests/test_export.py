"""Files for a paper: the same numbers as the store, in formats that open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from reports.export import export, latex, saved, spreadsheet_safe
from reports.figures import figure_4
from reports.reading import Collection
from reports.table_views import TableView, table_views

pytestmark = pytest.mark.usefixtures("one_figure")


def test_every_format_is_written_and_holds_the_numbers(
    collection: Collection, tmp_path: Path
) -> None:
    files = export(collection.groups, tmp_path / "export")
    names = {path.name for path in files}
    assert {"figure_4.svg", "figure_4.pdf", "figure_4.txt", "table_1.tex"} <= names
    assert sorted(names) == sorted(path.name for path in (tmp_path / "export").iterdir())
    assert (tmp_path / "export" / "figure_4.pdf").read_bytes().startswith(b"%PDF-")
    options = {"keep_default_na": False, "na_values": [""], "float_precision": "round_trip"}
    frames = [
        pd.read_csv(tmp_path / "export" / "tokens.csv", **options),
        pd.read_parquet(tmp_path / "export" / "tokens.parquet"),
    ]
    for frame in frames:
        assert len(frame) == 12 * 300
        for group in collection.groups:
            for run in group["run"].values:
                loss = frame.loc[frame["run"] == run, "loss"].to_numpy()
                np.testing.assert_array_equal(loss, group["loss"].sel(run=run).values)


def test_files_are_the_same_every_time(collection: Collection) -> None:
    for form in ("svg", "pdf"):
        once, again = (saved(figure_4(*collection.groups), form) for _ in range(2))
        assert once == again


def test_no_cell_of_a_csv_is_a_formula() -> None:
    labels = ["=1+1", "@SUM(A1)", "-2", "+3", " =x", "the", "a=b"]
    safe = spreadsheet_safe(pd.DataFrame({"token": labels, "loss": [-1.0] * len(labels)}))
    assert safe["token"].tolist() == ["'=1+1", "'@SUM(A1)", "'-2", "'+3", "' =x", "the", "a=b"]
    assert (safe["loss"] == -1.0).all()


def test_latex_holds_the_cells_and_escapes(collection: Collection) -> None:
    for view in table_views(collection.groups):
        text = latex(view)
        assert text.count("{") == text.count("}")
        assert text.count(r"\\") == sum(1 + len(rows) for _, rows in view.bodies) + 1
    odd = TableView(
        key="k", title="a_b", caption="50 % & more", head=["", r"\input{x}"],
        bodies=[("#1", [["~^", "$1$"]])],
    )  # fmt: skip
    text = latex(odd)
    assert r"\caption{a\_b. 50 \% \& more}" in text
    assert r"\textbackslash{}input\{x\}" in text
    assert r"\textasciitilde{}\textasciicircum{} & \$1\$" in text
