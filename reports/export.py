"""What a paper needs from a study: figures (SVG, PDF) and tables (CSV, parquet, LaTeX)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import xarray as xr

from reports import tables
from reports.excess_tables import excess_law, excess_views, predicted_losses
from reports.groups import display_label
from reports.mechanisms import mechanism_view, mechanisms
from reports.page import drawings
from reports.published import published_table_1
from reports.reading import BY_CLASS
from reports.style import ReportFigure
from reports.table_views import TableView, table_views, verdict_view
from run_store import write_atomically

TABLES = {
    "table_1": tables.table_1,
    "table_1_published": published_table_1,
    "loss_by_bin": tables.loss_by_bin,
    "speed_by_bin": tables.speed_by_bin,
    "fairness_gap": tables.fairness_gap,
    "theory": tables.theory,
    "excess_law": excess_law,
    "predicted_losses": predicted_losses,
    "mechanisms": mechanisms,
    "repair": tables.repair,
    "class_falls": tables.class_falls,
    "difficulty": tables.difficulty,
    "geometry": tables.geometry,
    "runs": tables.runs,
}


def export(groups: Sequence[xr.Dataset], folder: Path) -> list[Path]:
    """Write every figure and table of the groups into `folder`; returns the files written.

    Each file is written beside and renamed. Raises OSError where the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {}
    for draw, shown in drawings(groups):
        figure = draw(*shown)
        for format in ("svg", "pdf"):
            files[f"{draw.__name__}.{format}"] = saved(figure, format)
        files[f"{draw.__name__}.txt"] = f"{figure.name}. {figure.caption}\n".encode(
            errors="replace"
        )
    frames = {name: make(*groups) for name, make in TABLES.items()}
    for name, frame in (frames | {"tokens": tokens(groups)}).items():
        if len(frame):
            files[f"{name}.csv"] = spreadsheet_safe(frame).to_csv(index=False).encode()
            files[f"{name}.parquet"] = frame.to_parquet(index=False)
    views = [*table_views(groups), *excess_views(groups), mechanism_view(groups), verdict_view()]
    for view in filter(None, views):
        files[f"{view.key.replace('-', '_')}.tex"] = latex(view).encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def saved(figure: ReportFigure, format: str) -> bytes:
    """The figure as an SVG or PDF file, the same bytes every time."""
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    return figure.drawn(format, dpi=300, salt=figure.name, metadata=dates[format])


def tokens(groups: Sequence[xr.Dataset]) -> pd.DataFrame:
    """One row a class and run: label, training count, final loss and accuracy, learning speed, and
    the share of the windows that saw it."""
    frames = []
    for group in groups:
        labels = [display_label(str(label)) for label in group["label"].values]
        for run in group["run"].values:
            at = group.sel(run=run)
            columns = {
                "runs": group.attrs["name"],
                "run": run,
                "weight_decay": float(at["weight_decay"]),
                "seed": int(at["seed"]),
                "token": labels,
                "count": group["class_count"].values,
            }
            frames.append(pd.DataFrame(columns | {name: at[name].values for name in BY_CLASS}))
    return pd.concat(frames, ignore_index=True)


def spreadsheet_safe(frame: pd.DataFrame) -> pd.DataFrame:
    """Text that a spreadsheet would take for a formula, with an apostrophe before it."""
    safe = frame.copy()
    for name in frame.columns:
        if not pd.api.types.is_numeric_dtype(frame[name]):
            text = frame[name].astype(str)
            safe[name] = text.where(~text.str.match(_FORMULA), "'" + text)
    return safe


_FORMULA = r"\s*[=+\-@\t\r]"


def latex(view: TableView) -> str:
    """A table for booktabs, with its caption."""
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_escaped(f'{view.title}. {view.caption}')}}}",
    ]
    lines += [f"\\begin{{tabular}}{{l{'r' * (len(view.head) - 1)}}}", "\\toprule"]
    lines += [_row(view.head), "\\midrule"]
    for place, (heading, rows) in enumerate(view.bodies):
        lines += ["\\addlinespace"] if place else []
        lines.append(f"\\multicolumn{{{len(view.head)}}}{{l}}{{{_escaped(heading)}}} \\\\")
        lines += [_row(row) for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(_escaped(cell) for cell in cells) + " \\\\"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "λ": r"$\lambda$", "−": r"$-$", "≤": r"$\le$", "²": r"$^2$", "–": "--",
    "√": r"$\surd$", "×": r"$\times$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
