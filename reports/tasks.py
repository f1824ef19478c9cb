"""What weight decay does to tasks, and to held-out text beside the text of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from frequency_bins import FrequencyBins, bin_summary, seed_band
from llm_experiments.downstream.results import (
    FILE,
    Downstream,
    differences,
    read_downstream,
    scores,
)
from reports.groups import at_decay, bin_range

# Scores that are read off a setting's curve: their names here, and task, part and score there.
READ_OFF = {
    "sentiment": ("sentiment", "all", "accuracy"),
    "cloze": ("next token", "all", "mean reciprocal rank"),
    "held_out": ("next token", "all", "loss (nats)"),
}
_SHOWN = ("accuracy", "mean reciprocal rank", "loss (nats)")


def task_variables(
    folder: Path, counts: np.ndarray, loss: np.ndarray, bins: FrequencyBins
) -> dict[str, Any]:
    """What a run's group holds of its tasks: `tasks` (READ_OFF), and `text_loss` (text, bin).

    text_loss: mean loss in nats over the tokens of each frequency bin, of training and of held-out
    text. NaN where the run was not measured. Raises ValueError for a damaged file.
    """
    measured = read_downstream(folder) if folder.is_dir() else None
    text_loss = np.full((2, len(bins)), math.nan)
    text_loss[0] = bin_summary(bins, loss, np.where(np.isnan(loss), 0, counts)).mean
    tasks = np.full(len(READ_OFF), math.nan)
    if measured is not None:
        found = {(m.task, m.part, m.score): value for m, value in scores(measured).items()}
        tasks = np.array([found.get(key, math.nan) for key in READ_OFF.values()])
        place = np.searchsorted(np.array(bins.edges), measured.token_count, side="right") - 1
        for k in range(len(bins)):
            if (own := (place == k) & (measured.token_count > 0)).any():
                text_loss[1, k] = measured.token_loss[own].mean(dtype=np.float64)
    return {"tasks": ("task", tasks), "text_loss": (("text", "bin"), text_loss)}


def rises(group: xr.Dataset, low: float, high: float) -> np.ndarray | None:
    """(S, 2, bin): by how much decay raised the loss on training and held-out text, by seed.

    None where no seed was measured at both decays.
    """
    sides = []
    seeds = [set(at_decay(group, "seed", decay).tolist()) for decay in (low, high)]
    common = sorted(set.intersection(*seeds))
    for decay in (low, high):
        order = at_decay(group, "seed", decay).tolist()
        sides.append(at_decay(group, "text_loss", decay)[[order.index(seed) for seed in common]])
    apart = sides[1] - sides[0]
    apart = apart[np.isfinite(apart[:, 1]).any(axis=1)]
    return apart if len(apart) else None


def downstream(
    group: xr.Dataset, low: float, high: float, folders: Mapping[str, Path]
) -> pd.DataFrame:
    """Every task at two weight decays, and their difference, paired by seed and item.

    Columns task, part, score, low, high, difference, half_width, items, n (seeds), and for losses
    of a bin `training`, by how much that of the training text rose, with `training_half_width`.
    Empty where no seed was measured at both, and with a `note` where they cannot be compared.
    """
    cells = {}
    for run, decay, seed in zip(
        *(group[name].values.tolist() for name in ("run", "weight_decay", "seed")), strict=True
    ):
        if decay in (low, high) and run in folders:
            cells[decay, seed] = folders[run]
    seeds = sorted({s for d, s in cells if (low, s) in cells and (high, s) in cells})
    if not seeds:
        return pd.DataFrame()
    sides: list[list[Downstream]] = [
        [m for s in seeds if (m := read_downstream(cells[decay, s]))] for decay in (low, high)
    ]
    try:
        found = differences(*sides)
    except ValueError as error:
        return pd.DataFrame([{"note": str(error)}])
    training = _training_rises(group, low, high)
    rows = []
    for d in found:
        if d.measure.score not in _SHOWN:
            continue
        row = {"task": d.measure.task, "part": d.measure.part, "score": d.measure.score}
        row |= {"low": d.first, "high": d.second, "difference": d.band.mean}
        row |= {"half_width": d.band.half_width, "items": d.items, "n": d.seeds}
        of_bin = training.get(d.measure.part) if d.measure.score == "loss (nats)" else None
        row |= dict(
            zip(("training", "training_half_width"), of_bin or (math.nan, math.nan), strict=True)
        )
        rows.append(row)
    return pd.DataFrame(rows)


def _training_rises(group: xr.Dataset, low: float, high: float) -> dict[str, tuple[float, float]]:
    apart = rises(group, low, high)
    if apart is None:
        return {}
    band = seed_band(apart[:, 0])
    return {
        f"seen {bin_range(group, k)}×": (float(band.mean[k]), float(band.half_width[k]))
        for k in range(group.sizes["bin"])
    }


def measured_folders(runs: Sequence[tuple[str, Path]]) -> dict[str, Path]:
    """The folders of the runs that have results, by run id."""
    return {run: folder for run, folder in runs if (folder / FILE).is_file()}
