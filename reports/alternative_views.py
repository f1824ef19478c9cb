"""The page's section "Does it matter, and what helps?": its sentences and its two tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from reports.alternatives import EVERYTHING, Comparison, compared, readings
from reports.table_views import TableView, view_of_runs
from reports.tasks import downstream


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the section says of all comparisons."""

    sentences: tuple[str, ...]
    tables: tuple[TableView, ...]


def section(groups: Sequence[xr.Dataset], folders: Mapping[str, Path]) -> Section | None:
    """The section; None where nothing is to be compared.

    `folders`: of the runs that were measured on tasks, by run id.
    """
    found = compared(groups)
    if not found:
        return None
    frame = readings(found)
    tasks = [downstream(c.group, *c.span, folders) for c in found]
    sentences: list[str] = []
    for comparison, measured in zip(found, tasks, strict=True):
        name = f"{comparison.name}: " if len(found) > 1 else ""
        own = frame[frame["runs"] == comparison.name]
        said = [_of_tasks(comparison, measured), *_of_settings(own), _of_repairs(own)]
        said.append(_not_run(comparison))
        sentences += [name + sentence for sentence in said if sentence]
    views = [_settings_view(frame), *_tasks_views(found, tasks)]
    return Section(sentences=tuple(sentences), tables=tuple(view for view in views if view))


def _band(mean: float, half: float, form: str = "+.3f", factor: float = 1.0) -> str:
    """ "+0.12 ± 0.03"; "one seed" in place of the interval where there is none."""
    if not math.isfinite(mean):
        return "–"
    shown = f"{factor * mean:{form}}".replace("-", "−")
    return f"{shown} ± {factor * half:{form.removeprefix('+')}}" if math.isfinite(half) else shown


def _clear(mean: float, half: float) -> bool:
    """Whether the interval leaves 0 out; never where there is no interval."""
    return math.isfinite(half) and abs(mean) > half


def _of_tasks(comparison: Comparison, frame: pd.DataFrame) -> str:
    if not len(frame):
        return (
            "Whether it shows in a task was not measured: no runs of one seed, without and with "
            "weight decay, were given to `python -m llm_experiments downstream`."
        )
    if "note" in frame:
        return f"Whether it shows in a task cannot be told: {frame['note'].iloc[0]}."
    rare = str(frame.query("task == 'next token' and training.notnull()")["part"].iloc[0])
    asked = {
        "accuracy in telling sentiment": ("sentiment", "all", "accuracy"),
        "that of the reviews with the rarest tokens": ("sentiment", "rarest quarter", "accuracy"),
        "the mean reciprocal rank of next tokens": ("next token", "all", "mean reciprocal rank"),
        f"that of tokens {rare}": ("next token", rare, "mean reciprocal rank"),
        "that of whole words seen 1–3×": ("word", "seen 1–3×", "mean reciprocal rank"),
    }
    worse, better, open_ = [], [], []
    for words, key in asked.items():
        row = _row(frame, key)
        if row is not None:
            shown = f"{words} ({_band(row['difference'], row['half_width'])})"
            clear = _clear(row["difference"], row["half_width"])
            (open_ if not clear else worse if row["difference"] < 0 else better).append(shown)
    moved = ((worse, "fell"), (better, "rose"))
    parts = [f"{', '.join(which)} {verb}" for which, verb in moved if which]
    parts += [f"{', '.join(open_)} cannot be told from no change"] if open_ else []
    lead = "The damage shows in a task" if worse else "No damage can be told in a task"
    low, high = comparison.span
    seeds = int(frame["n"].iloc[0])
    said = (
        f"{lead}: as weight decay went from {low:g} to {high:g} (n = {seeds} "
        f"seed{'s' * (seeds > 1)}), {'; '.join(parts)}."
    )
    return f"{said} {_memorising(frame, rare)}".strip()


def _memorising(frame: pd.DataFrame, rare: str) -> str:
    row = _row(frame, ("next token", rare, "loss (nats)"))
    if row is None:
        return ""
    trained = _band(row["training"], row["training_half_width"])
    new = _band(row["difference"], row["half_width"])
    said = f"The loss of tokens {rare} changed by {trained} nats on training text and by {new} on"
    verdict = "whether learning was lost or won is open"
    if _clear(row["difference"], row["half_width"]):
        verdict = "decay cost learning, not memorising alone"
        if row["difference"] < 0 and not row["training"] > 0:
            verdict = "decay helped both"
        elif row["difference"] < 0:
            verdict = "what decay took was memorised, and what it left was better learned"
    return f"{said} held-out text: {verdict}."


def _row(frame: pd.DataFrame, key: tuple[str, str, str]) -> pd.Series[Any] | None:
    own = frame[(frame[["task", "part", "score"]] == list(key)).all(axis=1)]
    return own.iloc[0] if len(own) else None


def _of_settings(frame: pd.DataFrame) -> list[str]:
    first = frame.iloc[0]
    at = f"at the average loss of weight decay {first['weight_decay']:g} ({first['average']:.3f})"
    asked = {
        "regulariser": "Is it decay, or any regularisation?",
        "optimizer": "Does another optimizer avoid it?",
        "repair": "Does a repair?",
    }
    said = []
    for kind, question in asked.items():
        own = frame[(frame["kind"] == kind) & (frame["setting"] != "weight decay")]
        below, above, open_, missed = [], [], [], []
        for row in own.to_dict("records"):
            mean, half = row["balanced_difference"], row["balanced_half_width"]
            if not row["n"]:
                missed.append(row["setting"])
                continue
            shown = f"{row['setting']} ({_band(mean, half)})"
            (open_ if not _clear(mean, half) else below if mean < 0 else above).append(shown)
        parts = [f"lower token-balanced loss with {', '.join(below)}"] if below else []
        parts += [f"a higher one with {', '.join(above)}"] if above else []
        parts += [f"none that can be told apart with {', '.join(open_)}"] if open_ else []
        parts += [f"that average is not reached with {', '.join(missed)}"] if missed else []
        if parts:
            said.append(f"{question} {at[0].upper()}{at[1:]}: {'; '.join(parts)} (nats).")
    return said


def _of_repairs(frame: pd.DataFrame) -> str:
    """What repairs change at the reference's own weight decay, and what was predicted."""
    said = []
    for row in frame.query("kind == 'repair' and balanced_change.notnull()").to_dict("records"):
        average, half = row["average_change"], row["average_change_half"]
        keeps = "raises the average" if average > 0 else "lowers the average"
        if not _clear(average, half):
            keeps = "keeps the average as far as can be told"
        balanced = _band(row["balanced_change"], row["balanced_change_half"])
        theory = ""
        if math.isfinite(row["predicted_change"]):
            theory = f", where the theory predicted {_band(row['predicted_change'], math.nan)}"
        said.append(
            f"{row['setting']} {keeps} ({_band(average, half)}) and changes the token-balanced "
            f"loss by {balanced}{theory}"
        )
    decay = frame["weight_decay"].iloc[0]
    return f"At weight decay {decay:g} itself: {'; '.join(said)} (nats)." if said else ""


def _not_run(comparison: Comparison) -> str:
    run = {name for curve in comparison.curves for name in curve.changed}
    run |= {str(curve.changed.get("optimizer")) for curve in comparison.curves}
    missing = [words for words, name in EVERYTHING.items() if name not in run]
    return f"Not run: {', '.join(missing)}." if missing else ""


def _settings_view(frame: pd.DataFrame) -> TableView | None:
    def cells(row: Any) -> list[str]:
        read = [_band(row.balanced, math.nan, ".3f"), _gap(row, "balanced"), _gap(row, "rarest")]
        tasks = [_gap(row, "sentiment", "+.1f", 100), _gap(row, "held_out")]
        same = [
            _band(getattr(row, f"{name}_change"), getattr(row, f"{name}_change_half"))
            for name in ("average", "balanced")
        ]
        predicted = _band(row.predicted_change, math.nan)
        note = row.note if not row.n else ""
        return [
            row.setting,
            str(row.n),
            *(read if not note else [note, "", ""]),
            *tasks,
            *same,
            predicted,
        ]

    def heading(name: str, part: pd.DataFrame) -> str:
        first = part.iloc[0]
        return (
            f"{name}, read at {first['average']:.3f} nats: weight decay {first['weight_decay']:g}"
        )

    return view_of_runs(
        frame,
        cells,
        heading=heading,
        key="table-alternatives",
        title="Settings at the same average loss",
        caption="Each setting was swept and is read where its average loss is the reference's; Δ "
        "is the difference to the reference there, mean over the seeds that reach it ± 95 % "
        "interval, paired by seed (none for one seed). Rarest: mean loss of the rarest bin. "
        "Sentiment in points of accuracy, held-out loss in nats, where they were measured. Same λ: "
        "changes at the reference's own weight decay; predicted: that of the balanced loss by the "
        "theory of weights-only decay, at weak decay, nothing fitted to the repaired runs.",
        head=["setting", "seeds", "balanced", "Δ balanced", "Δ rarest", "Δ sentiment",
              "Δ held-out", "same λ: average", "same λ: balanced", "predicted"],
    )  # fmt: skip


def _gap(row: Any, name: str, form: str = "+.3f", factor: float = 1.0) -> str:
    if row.setting == "weight decay":
        return "–"
    mean, half = getattr(row, f"{name}_difference"), getattr(row, f"{name}_half_width")
    return _band(mean, half, form, factor)


def _tasks_views(
    found: Sequence[Comparison], tasks: Sequence[pd.DataFrame]
) -> list[TableView | None]:
    frames = [
        frame.assign(runs=c.name, low_decay=c.span[0], high_decay=c.span[1])
        for c, frame in zip(found, tasks, strict=True)
        if len(frame) and "note" not in frame
    ]
    if not frames:
        return []

    def cells(row: Any) -> list[str]:
        return [
            f"{row.task}, {row.part}: {row.score}",
            *(f"{row.low:.3f}", f"{row.high:.3f}", _band(row.difference, row.half_width)),
            _band(row.training, row.training_half_width),
            f"{row.items:,}",
        ]

    def heading(name: str, part: pd.DataFrame) -> str:
        first = part.iloc[0]
        decays = f"λ = {first['low_decay']:g} and {first['high_decay']:g}"
        return f"{name}, {decays} (n = {first['n']})"

    return [
        view_of_runs(
            pd.concat(frames, ignore_index=True),
            cells,
            heading=heading,
            key="table-downstream",
            title="Tasks without and with weight decay",
            caption="Reviews that no model was trained on. Sentiment: a logistic regression of the "
            "model's frozen features, by how rare the review's tokens are (mean log count). Next "
            "token, and word (of several tokens, given its first): by how often training had them. "
            "Differences with 95 % intervals, paired by item and seed, over the reviews and seeds. "
            "Training: by how much the loss of the same bin of the training text rose.",
            head=["", "without", "with", "difference", "training", "items"],
        )
    ]
