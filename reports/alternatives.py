"""Settings compared where they have the same average loss: what damages rare classes, what helps.

A setting is a curve: the runs of its sweep, over weight decay or over the strength of a regulariser
in its place. Each is read at the average loss that the reference, plain weight decay, has at one of
its decays, seed by seed (`frequency_bins.at_average`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from frequency_bins import AtAverage, at_average, seed_band
from reports.groups import at_decay, weight_decays
from reports.tasks import READ_OFF
from ufm.repair import weak_decay_losses

# What a config says where nothing is changed, and the kind of what changes it.
KINDS = {
    "regulariser": {
        "dropout": 0.0, "label_smoothing": 0.0, "norm": "rmsnorm", "tie_embeddings": True,
        "model": "",
    },
    "optimizer": {"optimizer": "adamw", "decay_mode": "decoupled"},
    "repair": {
        "loss_weight_exponent": 0.0, "decay": "all", "decay_exponent": 0.0, "decay_until": 1.0,
    },
    "tuning": {"learning_rate": None, "beta1": 0.9, "beta2": 0.999},
}  # fmt: skip
_PLAIN = {name: value for fields in KINDS.values() for name, value in fields.items()}
_STRENGTHS = ("dropout", "label_smoothing")
_OF_DECAY = {"decay", "decay_exponent", "decay_until"}
_SAID = {
    "norm": "{}", "optimizer": "{}", "model": "{}", "decay_mode": "Adam, L2",
    "tie_embeddings": "untied", "decay": "decay of {}", "decay_exponent": "decay by count^{:g}",
    "decay_until": "decay for {:.0%} of the steps", "loss_weight_exponent": "loss × count^−{:g}",
    "dropout": "dropout {:g}", "label_smoothing": "label smoothing {:g}",
}  # fmt: skip
EVERYTHING = {
    "dropout": "dropout", "label smoothing": "label_smoothing", "LayerNorm": "norm",
    "two matrices for embeddings and head": "tie_embeddings", "a mixture of experts": "model",
    "Adam with L2": "decay_mode", "Muon": "muon", "Lion": "lion",
    "cautious decay": "adamw-cautious", "loss weights": "loss_weight_exponent",
    "decay of parts of the model": "decay", "decay by count": "decay_exponent",
    "decay switched off": "decay_until",
}  # fmt: skip
"""What may be compared, with the field or the optimizer that does it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A setting: S seeds by P points of its sweep; NaN where a seed has no such run."""

    name: str
    kind: str
    changed: Mapping[str, Any]
    """what it has that the reference has not"""
    decays: tuple[float, ...]
    """(P): weight decays"""
    average: np.ndarray
    balanced: np.ndarray
    rarest: np.ndarray
    tasks: np.ndarray
    """(S, P, READ_OFF)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Settings of one model and corpus: the reference, others, and where they are read."""

    name: str
    reference: Curve
    curves: tuple[Curve, ...]
    place: int
    """of the reference's points: the decay above 0 whose average most curves reach (the largest)"""
    group: xr.Dataset
    """the reference's runs"""

    @property
    def decay(self) -> float:
        """The reference's weight decay there."""
        return self.reference.decays[self.place]

    @property
    def span(self) -> tuple[float, float]:
        """The reference's least and largest weight decay, between which tasks are compared."""
        return self.reference.decays[0], self.reference.decays[-1]

    def read(self, curve: Curve, values: np.ndarray) -> AtAverage:
        """Values (S, P) of a curve at the reference's average loss."""
        return at_average(curve.average, values, self.reference.average[:, self.place])


def compared(groups: Sequence[xr.Dataset]) -> list[Comparison]:
    """One comparison for each model and data that have a reference and another setting to read.

    The reference is the group with the fewest fields changed. A curve has two points at least; runs
    without decay are the reference's where only decay itself is changed, and for regularisers that
    are swept in place of decay. Mixtures of experts belong to the model without them.
    """
    families: dict[str, list[xr.Dataset]] = {}
    for group in groups:
        config = group.attrs["config"]
        rest = {name: value for name, value in config.items() if name not in _PLAIN}
        rest["model"] = str(config.get("model")).replace("-moe", "")
        rest["study"] = group.attrs.get("study")  # where two are on one page
        rest["counts"] = hash(group["class_count"].values.tobytes())
        families.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(group)
    found = [_comparison(family) for family in families.values() if len(family) > 1]
    return [comparison for comparison in found if comparison is not None]


def _comparison(family: Sequence[xr.Dataset]) -> Comparison | None:
    def off(group: xr.Dataset) -> int:
        told = _told(group.attrs["config"])
        fields = [name for name in told if name not in ("model", "learning_rate")]
        return ("-moe" in str(told["model"])) + sum(told[n] != _PLAIN[n] for n in fields)

    reference = min(family, key=off)
    theirs = _told(reference.attrs["config"])
    own = [(reference, decay) for decay in weight_decays([reference])]
    if len(own) < 2:
        return None
    seeds = sorted(set(reference["seed"].values.tolist()))
    sweeps = _sweeps([g for g in family if g is not reference], theirs, own, seeds)
    curves = [
        _curve(name, changed, points, seeds)
        for name, (changed, points) in sweeps.items()
        if len(points) > 1
    ]
    plain = _curve("weight decay", {}, own, seeds)
    if not curves:
        return None
    order = ["regulariser", "optimizer", "repair", "tuning"]
    curves.sort(key=lambda curve: order.index(curve.kind))

    def reach(place: int) -> tuple[int, float]:
        at = plain.average[:, place]
        reached = [at_average(c.average, c.average, at).reached for c in curves]
        return sum(reached), plain.decays[place]

    places = [place for place, decay in enumerate(plain.decays) if decay > 0]
    return Comparison(
        name=reference.attrs["name"],
        reference=plain,
        curves=tuple(curves),
        place=max(places, key=reach),
        group=reference,
    )


def _sweeps(
    others: Sequence[xr.Dataset],
    theirs: Mapping[str, Any],
    own: Sequence[tuple[xr.Dataset, float]],
    seeds: Sequence[int],
) -> dict[str, tuple[dict[str, Any], list[tuple[xr.Dataset, float]]]]:
    """What each setting changes of what the reference has (`theirs`), and its points, by name.

    `own`: the reference's points, of which those without decay may begin another's curve.
    """
    sweeps: dict[str, tuple[dict[str, Any], list[tuple[xr.Dataset, float]]]] = {}
    for group in others:
        told = _told(group.attrs["config"])
        changed = {field: value for field, value in told.items() if value != theirs[field]}
        points = [
            (group, decay)
            for decay in weight_decays([group])
            if {*at_decay(group, "seed", decay).tolist()} & {*seeds}
        ]
        if not (changed and points):
            continue
        name = _name(changed)
        if name in sweeps:  # an optimizer at another learning rate, say
            name = ", ".join(
                [name, *(_plainly(n, v) for n, v in changed.items() if n not in _SAID)]
            )
        if len(changed) == 1 and points[0][1] == 0 == points[-1][1] and {*changed} <= {*_STRENGTHS}:
            field = next(iter(changed))
            name = field.replace("_", " ")
            start = own[:1] * (own[0][1] == 0)
            points = [*sweeps.get(name, ({}, start))[1], *points]
            points.sort(key=lambda p, f=field: _told(p[0].attrs["config"])[f])
        elif points[0][1] and _of_decay_alone(changed):
            points = own[:1] * (own[0][1] == 0) + points
        sweeps[name] = changed, points
    return sweeps


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of each field, the plain value where it says nothing."""
    return {n: plain if config.get(n) is None else config[n] for n, plain in _PLAIN.items()}


def _of_decay_alone(changed: Mapping[str, Any]) -> bool:
    """So that the reference's runs without decay are its own too."""
    return {*changed} <= _OF_DECAY or changed.get("optimizer") == "adamw-cautious"


def _kind(changed: Mapping[str, Any]) -> str:
    kinds = [kind for kind, fields in KINDS.items() if {*fields} & {*changed}]
    return kinds[0] if kinds else "regulariser"


def _name(changed: Mapping[str, Any]) -> str:
    """Learning rate and memory go without saying where they go with another optimizer."""
    shown = [_SAID[n].format(v) for n, v in changed.items() if n in _SAID]
    return ", ".join(shown or [_plainly(n, v) for n, v in changed.items()])


def _plainly(field: str, value: float) -> str:
    return f"{field.replace('_', ' ')} {value:g}"


def _curve(
    name: str,
    changed: Mapping[str, Any],
    points: Sequence[tuple[xr.Dataset, float]],
    seeds: Sequence[int],
) -> Curve:
    """Of each point the runs of the seeds; of a seed with several runs the first."""
    shape = len(seeds), len(points)
    values = {n: np.full(shape, math.nan) for n in ("average", "balanced", "rarest")}
    tasks = np.full((*shape, len(READ_OFF)), math.nan)
    for p, (group, decay) in enumerate(points):
        rare = int(np.flatnonzero(group["bin_size"].values > 0)[0])
        for s, seed in enumerate(seeds):
            of = (group["weight_decay"].values == decay) & (group["seed"].values == seed)
            if not of.any():
                continue
            run = int(np.flatnonzero(of)[0])
            values["average"][s, p] = group["average_loss"].values[run]
            values["balanced"][s, p] = group["token_balanced_loss"].values[run]
            values["rarest"][s, p] = group["bin_loss"].values[run, rare]
            if "tasks" in group:
                tasks[s, p] = group["tasks"].values[run]
    return Curve(
        name=name,
        kind=_kind(changed),
        changed=changed,
        decays=tuple(decay for _, decay in points),
        tasks=tasks,
        **values,
    )


def alternatives(*groups: xr.Dataset) -> pd.DataFrame:
    """A row for each setting, beside the reference at `weight_decay` and its `average` loss.

    Read at that average, mean over the `n` seeds that reach it: token-balanced loss and loss of the
    rarest bin, and what they differ from the reference's by, with 95 % half widths over seeds; so
    for the tasks of READ_OFF. `note`: why a setting is not read. At the same weight decay, where it
    has it: the change of the average and of the balanced loss, with half widths; and the latter as
    the theory of weights-only decay predicts it at weak decay (ufm/THEORY.md, section 6, s = 1)
    from what decay adds to the reference, for loss weights and decay by rows.
    """
    return readings(compared(groups))


def readings(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """`alternatives` of what `compared` has found."""
    return pd.DataFrame([row for comparison in comparisons for row in _rows(comparison)])


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    reference, place = comparison.reference, comparison.place
    rows = []
    for curve in (reference, *comparison.curves):
        row: dict[str, Any] = {"runs": comparison.name, "setting": curve.name, "kind": curve.kind}
        row |= {"weight_decay": comparison.decay}
        row |= {"average": float(np.nanmean(reference.average[:, place]))}
        pairs = [("balanced", curve.balanced, reference.balanced[:, place])]
        pairs += [("rarest", curve.rarest, reference.rarest[:, place])]
        pairs += [
            (task, curve.tasks[..., i], reference.tasks[:, place, i])
            for i, task in enumerate(READ_OFF)
        ]
        row["note"] = comparison.read(curve, curve.balanced).reason
        for name, values, beside in pairs:
            read = comparison.read(curve, values)
            apart = read.values - beside
            known = np.isfinite(apart)
            row["n"] = int(known.sum()) if name == "balanced" else row["n"]
            row[name] = float(read.values[known].mean()) if known.any() else math.nan
            band = read.band(beside) if known.any() else None
            row[f"{name}_difference"] = float(band.mean) if band else math.nan
            row[f"{name}_half_width"] = float(band.half_width) if band else math.nan
        rows.append(row | _at_the_same_decay(comparison, curve))
    return rows


def _at_the_same_decay(comparison: Comparison, curve: Curve) -> dict[str, float]:
    reference, place = comparison.reference, comparison.place
    names = ("average_change", "average_change_half", "balanced_change", "balanced_change_half")
    found = dict.fromkeys((*names, "predicted_change"), math.nan)
    if curve is reference or comparison.decay not in curve.decays:
        return found
    own = curve.decays.index(comparison.decay)
    for name in ("average", "balanced"):
        apart = getattr(curve, name)[:, own] - getattr(reference, name)[:, place]
        if (known := np.isfinite(apart)).any():
            band = seed_band(apart[known])
            found |= {f"{name}_change": float(band.mean)}
            found |= {f"{name}_change_half": float(band.half_width)}
    if {*curve.changed} <= {"loss_weight_exponent", "decay_exponent"} and reference.decays[0] == 0:
        _, left = weak_decay_losses(
            comparison.group["class_count"].values,
            loss_exponent=curve.changed.get("loss_weight_exponent", 0.0),
            row_exponent=curve.changed.get("decay_exponent", 0.0),
            feature_sharing=1.0,
        )
        added = np.nanmean(reference.balanced[:, place] - reference.balanced[:, 0])
        found["predicted_change"] = float((left - 1) * added)
    return found
