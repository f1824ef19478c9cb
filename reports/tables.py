"""The paper's Table 1 and the tables beyond it, as data frames of numbers, one row a cell.

Means and standard deviations are over seeds (std with ddof = 1, NaN for a single seed), losses in
nats. The column `runs` names the group of comparable runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from frequency_bins import seed_band
from reports.groups import (
    REPAIRS,
    at_decay,
    bin_range,
    effective_counts,
    over_seeds,
    seed_mean,
    weight_decays,
    welch_half_width,
)
from reports.last_layers import MEASURES, end_classes
from reports.ranks import by_class, share_explained
from ufm import CriticalCountFit

METRICS = {
    "average_loss": "Training loss",
    "token_balanced_loss": "Per-token loss",
    "token_balanced_perplexity": "Per-token PPL",
    "token_balanced_accuracy": "Per-token accuracy (%)",
}
PERCENT = {"token_balanced_accuracy": 100.0}


def table_1(*groups: xr.Dataset) -> pd.DataFrame:
    """Table 1: training loss, per-token loss, perplexity and accuracy by weight decay."""
    frames = []
    for group in groups:
        for name, metric in METRICS.items():
            frame = _frame(group, over_seeds(group, name)).assign(metric=metric)
            frame[["mean", "std", "half_width"]] *= PERCENT.get(name, 1.0)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def loss_by_bin(*groups: xr.Dataset) -> pd.DataFrame:
    """Mean loss of the tokens of each frequency bin by weight decay (Figures 6a and 7a)."""
    return _by_bin(groups, "bin_loss")


def speed_by_bin(*groups: xr.Dataset) -> pd.DataFrame:
    """Mean learning speed of the tokens of each bin by weight decay (Figures 5 and 7b).

    `windows_seen`: the mean share of the windows that saw a token of the bin. In the others its
    loss is the last one seen; `carried_back` is the speed with the next one seen in its place. How
    far the two are apart tells how much of a bin's slowness may be absence.
    """
    return _by_bin(
        groups,
        "bin_learning_speed",
        windows_seen="bin_windows_seen",
        carried_back="bin_speed_carried_back",
    )


def _by_bin(groups: Sequence[xr.Dataset], name: str, **beside: str) -> pd.DataFrame:
    """A variable by bin and weight decay, with the means of others in columns beside it."""
    frames = []
    for group in groups:
        band = over_seeds(group, name)
        means = {column: over_seeds(group, other)["mean"] for column, other in beside.items()}
        for place, size in enumerate(group["bin_size"].values):
            frame = _frame(group, band.isel(bin=place)).assign(
                count=bin_range(group, place),
                tokens=int(size),
                share_of_text=float(group["bin_share"].values[place]),
                **{column: mean.isel(bin=place).values for column, mean in means.items()},
            )
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def fairness_gap(*groups: xr.Dataset) -> pd.DataFrame:
    """Loss of the rarest bin minus that of the most frequent one, by weight decay.

    `half_width` is over seeds; `half_width_over_tokens`, the mean of the runs', is there with a
    single seed too.
    """
    frames = []
    for group in groups:
        within = over_seeds(group, "fairness_gap_half_width")["mean"].values
        frame = _frame(group, over_seeds(group, "fairness_gap"))
        frames.append(frame.assign(half_width_over_tokens=within))
    return pd.concat(frames, ignore_index=True)


def class_falls(*groups: xr.Dataset) -> pd.DataFrame:
    """How far test accuracy falls from the smallest weight decay on, in points (Figure 9).

    Of the three rarest classes, of the three most frequent and, as `difference`, of the former
    beyond the latter: means over seeds with 95 % half widths, paired by seed. `least` and `most`
    are the smallest and the largest fall of a class, each a mean over seeds. Where all counts are
    equal, the order is that of the classes, and `balanced` is true.
    """
    rows = []
    for group in groups:
        counts = group["class_count"].values
        ends = end_classes(counts)
        accuracy = 100 * group["test_accuracy"].values
        decay, seed = group["weight_decay"].values, group["seed"].values
        least = decay == decay.min()
        first = dict(zip(seed[least], accuracy[least], strict=True))
        for value in np.unique(decay)[1:]:
            pairs = zip(seed[decay == value], accuracy[decay == value], strict=True)
            falls = np.array([first[s] - a for s, a in pairs if s in first])
            if not len(falls):
                continue
            rare, frequent = (falls[:, places].mean(axis=1) for places in ends)
            bands = {"rare": rare, "frequent": frequent, "difference": rare - frequent}
            row = {"runs": group.attrs["name"], "weight_decay": float(value), "n": len(falls)}
            for name, values in bands.items():
                band = seed_band(values)
                row |= {name: float(band.mean), f"{name}_half_width": float(band.half_width)}
            by_class = falls.mean(axis=0)
            row |= {"least": by_class.min(), "most": by_class.max()}
            rows.append(row | {"balanced": counts.min() == counts.max()})
    return pd.DataFrame(rows)


def difficulty(*groups: xr.Dataset) -> pd.DataFrame:
    """What test accuracy goes with where the seed chose which class has which count (Figure 9).

    `by_rank` and `by_class` are the adjusted R² of the mean over seeds of a rank in count, and of
    a class, over all of a weight decay's accuracies: what frequency explains, and what the class's
    own difficulty does. Empty without shuffled runs of two seeds.
    """
    rows = []
    for group in groups:
        if (classes := by_class(group)) is None:
            continue
        for decay in weight_decays([group]):
            ranked, named = (at_decay(view, "test_accuracy", decay) for view in (group, classes))
            if len(ranked) > 1:
                row = {"runs": group.attrs["name"], "weight_decay": decay, "n": len(ranked)}
                row |= {"by_rank": share_explained(ranked), "by_class": share_explained(named)}
                rows.append(row)
    return pd.DataFrame(rows)


def geometry(*groups: xr.Dataset) -> pd.DataFrame:
    """Neural-collapse measures of the last layer by weight decay; empty where no run has any.

    Columns as `reports.last_layers.MEASURES` and, with _std, their deviation over seeds.
    """
    frames = [
        _means(group, MEASURES)
        for group in groups
        if "within_class" in group and group["within_class"].notnull().any()
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def theory(*groups: xr.Dataset) -> pd.DataFrame:
    """Fitted n_c, R^2, and the classes it says are neglected beside those never predicted right."""
    names = ("critical_count", "r_squared", "predicted_neglected", "neglected")
    columns = ["runs", "weight_decay", "n", "critical_count_std", *names]
    return pd.concat([_means(group, names)[columns] for group in groups], ignore_index=True)


def runs(*groups: xr.Dataset) -> pd.DataFrame:
    """One row a run: its metrics, fairness gap with a 95 % interval over classes, n_c and R^2."""
    names = [
        str(name)
        for name, variable in groups[0].data_vars.items()
        if variable.dims == ("run",) and all(name in group for group in groups)
    ]
    frames = [
        pd.DataFrame(
            {"runs": group.attrs["name"]}
            | {name: group[name].values for name in ("run", "weight_decay", "seed", *names)}
        )
        for group in groups
    ]
    return pd.concat(frames, ignore_index=True)


def repair(*groups: xr.Dataset) -> pd.DataFrame:
    """What loss weights and spared parameters change, for groups that differ in nothing else.

    Average and token-balanced loss and the fairness gap by loss-weight exponent g (weights
    n_k^-g), decay group and weight decay, with the corrected theory's prediction: the n_c fitted
    without weights at the same weight decay, put into r_k (ufm/THEORY.md, section 6). A weight
    decay at which nothing is compared has no row. Empty where the study varies neither.
    """
    names = ("average_loss", "token_balanced_loss", "fairness_gap")
    rows: list[dict[str, Any]] = []
    for family in families(groups):
        compared = _compared_decays(family)
        for group in family:
            repairs = _repairs(group)
            exponent = float(repairs["loss_weight_exponent"])
            for decay in weight_decays([group]):
                if decay not in compared:
                    continue
                baseline = _unweighted_critical_count(family, repairs["decay"], decay)
                predicted = _predicted(group["class_count"].values, baseline, exponent)
                rows.append(
                    {"family": family[0].attrs["name"], "runs": group.attrs["name"]}
                    | {**repairs, "weight_decay": decay}
                    | {"n": len(at_decay(group, names[0], decay))}
                    | {name: float(seed_mean(group, name, decay)) for name in names}
                    | dict(zip(("predicted_average", "predicted_balanced"), predicted, strict=True))
                )
    return pd.DataFrame(rows)


def comparison(first: Sequence[xr.Dataset], second: Sequence[xr.Dataset]) -> pd.DataFrame:
    """Two studies side by side: each metric at each weight decay that both have, and b − a.

    Groups are paired by name, then by model, then as the only ones. `half_width` is Welch's 95 %
    interval of the difference over seeds, NaN where a side has one seed. Empty without a pair.
    """
    frames = []
    for a, b in _pairs(first, second):
        for name, metric in (METRICS | {"fairness_gap": "Fairness gap"}).items():
            percent = PERCENT.get(name, 1.0)
            for decay in np.intersect1d(a["weight_decay"].values, b["weight_decay"].values):
                values = [percent * at_decay(group, name, decay) for group in (a, b)]
                frames.append(
                    {
                        "runs": f"{a.attrs['name']} | {b.attrs['name']}",
                        "metric": metric,
                        "weight_decay": float(decay),
                        "first": float(values[0].mean()),
                        "second": float(values[1].mean()),
                        "difference": float(values[1].mean() - values[0].mean()),
                        "half_width": welch_half_width(*values),
                    }
                )
    return pd.DataFrame(frames)


def _pairs(
    first: Sequence[xr.Dataset], second: Sequence[xr.Dataset]
) -> list[tuple[xr.Dataset, xr.Dataset]]:
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    keys = (lambda group: group.attrs["name"], lambda group: group.attrs["config"].get("model"))
    for key in keys:
        ours, theirs = ({key(group): group for group in side} for side in (first, second))
        shared = [name for name in ours if name in theirs]
        if shared and (len(ours), len(theirs)) == (len(first), len(second)):
            return [(ours[name], theirs[name]) for name in shared]
    return []


def _frame(group: xr.Dataset, band: xr.Dataset) -> pd.DataFrame:
    names = ("weight_decay", "n", "mean", "std", "half_width")
    return pd.DataFrame({"runs": group.attrs["name"]} | {name: band[name].values for name in names})


def _means(group: xr.Dataset, names: Iterable[str]) -> pd.DataFrame:
    """Variables by weight decay in columns of their names, then their deviations, with _std."""
    bands = {name: over_seeds(group, name) for name in names}
    frame = _frame(group, next(iter(bands.values())))[["runs", "weight_decay", "n"]]
    columns = {name: band["mean"].values for name, band in bands.items()}
    columns |= {f"{name}_std": band["std"].values for name, band in bands.items()}
    return frame.assign(**columns)


def _repairs(group: xr.Dataset) -> dict[str, Any]:
    config = group.attrs["config"]
    return {name: config.get(name) or default for name, default in REPAIRS.items()}


def families(groups: Iterable[xr.Dataset]) -> list[list[xr.Dataset]]:
    """Groups that differ in nothing but how they repair, the unrepaired one first."""
    found: dict[str, list[xr.Dataset]] = {}
    for group in groups:
        config = group.attrs["config"]
        rest = {name: value for name, value in config.items() if name not in REPAIRS}
        found.setdefault(json.dumps(rest, sort_keys=True), []).append(group)
    return [
        sorted(family, key=lambda group: [str(value) for value in _repairs(group).values()])
        for family in found.values()
        if len(family) > 1
    ]


def _compared_decays(family: Sequence[xr.Dataset]) -> set[float]:
    """Weight decays that more than one group of the family has."""
    held = [decay for group in family for decay in weight_decays([group])]
    return {decay for decay in held if held.count(decay) > 1}


def comparisons(groups: Iterable[xr.Dataset]) -> list[tuple[float, list[xr.Dataset]]]:
    """For each family the largest weight decay at which there is something to compare, and the
    groups that have it; a family without one is left out."""
    found = []
    for family in families(groups):
        if compared := _compared_decays(family):
            decay = max(compared)
            found.append((decay, [group for group in family if decay in weight_decays([group])]))
    return found


def unrepaired(groups: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """The groups without those that repair another one."""
    repairs = [
        group
        for family in families(groups)
        for group in family
        if any(_repairs(other) == REPAIRS for other in family) and _repairs(group) != REPAIRS
    ]
    return [group for group in groups if not any(group is other for other in repairs)]


def _unweighted_critical_count(
    family: Sequence[xr.Dataset], decay_group: str, weight_decay: float
) -> float:
    for group in family:
        if _repairs(group) == {"loss_weight_exponent": 0, "decay": decay_group}:
            fitted = at_decay(group, "critical_count", weight_decay)
            if len(fitted):
                return float(fitted.mean())
    return math.nan


def _predicted(counts: np.ndarray, critical_count: float, exponent: float) -> tuple[float, float]:
    """Average and token-balanced loss under weights n_k^-exponent at the n_c without them."""
    if not math.isfinite(critical_count):
        return math.nan, math.nan
    n = counts[counts > 0]
    loss = law_loss(effective_counts(n, n, exponent), critical_count, vocab_size=len(counts))
    return float((n * loss).sum() / n.sum()), float(loss.mean())


def law_loss(effective_counts: np.ndarray, critical_count: float, *, vocab_size: int) -> np.ndarray:
    """The corrected law at a given n_c, in nats."""
    fit = CriticalCountFit(
        critical_count=critical_count,
        r_squared=math.nan,
        residuals=torch.empty(0, dtype=torch.float64),
        vocab_size=vocab_size,
    )
    return fit.loss(effective_counts).numpy()
