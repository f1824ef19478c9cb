"""Which mechanism makes rare tokens pay: what each predicts of s(n), measured, with a verdict.

s(n) = log(M(0) / M(decay)) / kappa is the share of its margin's decay that a token seen n times
suffers (`frequency_bins.margin_share`). A mechanism is tested by runs that differ from others in
what it speaks of alone; the recipe `mechanism` trains them. llm_experiments/MECHANISM.md has the
reasons, and what takes more than a sweep to measure.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from frequency_bins import excess_loss, seed_band, share_bins
from llm_experiments.training.kappa import kappa
from reports.groups import at_decay
from reports.table_views import TableView

Shares = np.ndarray
"""(S, K): s by seed and bin, of the bins that all have, the rarest first."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One candidate, and what tells whether it is at work."""

    name: str
    predicted: str
    changed: tuple[Mapping[str, Any], ...]
    """what each variant has that the reference has not"""
    evidence: Callable[..., np.ndarray]
    """(S,) of the reference's and the variants' shares: above 0 where the prediction holds"""


def _end(shares: Shares) -> np.ndarray:
    """(S, 2): the rarest and the most frequent bin."""
    return shares[:, [0, -1]]


MECHANISMS = (
    Mechanism(
        name="one factor of the logits is decayed: features are normalised",
        predicted="decay of the last gain alone does nothing (less than a tenth)",
        changed=({"decay": "last-norm"},),
        evidence=lambda all_, gain: (0.1 * all_ - gain)[:, 0],
    ),
    Mechanism(
        name="two factors are decayed: the last gain and the head",
        predicted="both add up to decay of everything, within 15 %",
        changed=({"decay": "last-norm"}, {"decay": "embeddings"}),
        evidence=lambda all_, *two: 0.15 - abs(_end(sum(two)) / _end(all_) - 1).max(axis=1),
    ),
    Mechanism(
        name="the inner body or the input table is decayed",
        predicted="decay of the rest does nothing (less than a tenth) to the rarest",
        changed=({"decay": "inner"},),
        evidence=lambda all_, inner: (0.1 * all_ - inner)[:, 0],
    ),
    Mechanism(
        name="a class is pushed back in the share of steps that hold it",
        predicted="twice the batch lowers s for all",
        changed=({"batch_size": 32},),
        evidence=lambda one, twice: (_end(one) - _end(twice)).min(axis=1),
    ),
    Mechanism(
        name="Adam's second moment forgets a rare class between its visits",
        predicted="a shorter memory lowers s of the rarest",
        changed=({"beta2": 0.9},),
        evidence=lambda long, short: (long - short)[:, 0],
    ),
    Mechanism(
        name="the push follows the residual, over a normaliser that remembers",
        predicted="without memory less comes back: s rises for all",
        changed=({"beta2": 0.9}, {"optimizer": "sign", "learning_rate": 1e-3}),
        evidence=lambda long, *short: np.minimum(*(_end(s - long).min(axis=1) for s in short)),
    ),
    Mechanism(
        name="sign descent's push does not shrink with the residual",
        predicted="it wins back everything: s near 0 (less than half)",
        changed=({"optimizer": "sign", "learning_rate": 1e-3},),
        evidence=lambda adam, sign: (0.5 * adam - sign)[:, 0],
    ),
    Mechanism(
        name="rare tokens borrow shared features, set by the vocabulary",
        predicted="another vocabulary moves s by more than a tenth somewhere",
        changed=({"vocab_size": 2048},),
        evidence=lambda one, other: abs(other / one - 1).max(axis=1) - 0.1,
    ),
    Mechanism(
        name="s is a property of the corpus",
        predicted="half the steps leave s as it is, within a tenth",
        changed=({"steps": 160},),
        evidence=lambda whole, half: 0.1 - abs(_end(half) / _end(whole) - 1).max(axis=1),
    ),
)


def mechanisms(*groups: xr.Dataset) -> pd.DataFrame:
    """A row for each mechanism that the groups test: runs, weight_decay, seeds, verdict.

    `reference` and `measured`: s of the rarest and the most frequent bin, the latter by variant.
    The verdict is "holds" or "refuted" where the 95 % interval of the evidence over paired seeds
    says so, "open" where it does not, and "(one seed)" beside it where there is no interval.
    """
    rows: list[dict[str, Any]] = []
    for reference, mechanism in itertools.product(groups, MECHANISMS):
        variants = [_variant(reference, changed, groups) for changed in mechanism.changed]
        if decay := _decay([reference, *variants]):
            rows += _row(mechanism, reference, [v for v in variants if v is not None], decay)
    # Of several references that a mechanism has, the one that most are tested against.
    tests = Counter((row["model"], row["runs"]) for row in rows)
    best = {
        (row["model"], row["mechanism"]): row
        for row in sorted(rows, key=lambda row: tests[row["model"], row["runs"]])
    }
    return pd.DataFrame([row for row in rows if best[row["model"], row["mechanism"]] is row])


def _row(
    mechanism: Mechanism, reference: xr.Dataset, variants: Sequence[xr.Dataset], decay: float
) -> list[dict[str, Any]]:
    by_bin = [_shares(group, reference, decay) for group in (reference, *variants)]
    seeds = sorted(set.intersection(*(set(found) for found in by_bin)))
    if not seeds:
        return []
    bins = min(len(next(iter(found.values()))) for found in by_bin)
    stacked = np.stack([[found[seed][:bins] for seed in seeds] for found in by_bin])
    shares = stacked[..., np.isfinite(stacked).all(axis=(0, 1))]
    if not shares.size:
        return []
    ends = [_end(of_group).mean(axis=0).tolist() for of_group in shares]
    return [
        {
            "runs": reference.attrs["name"],
            "model": str(reference.attrs["config"].get("model")),
            "weight_decay": decay,
            "mechanism": mechanism.name,
            "predicted": mechanism.predicted,
            "reference": tuple(ends[0]),
            "measured": tuple(map(tuple, ends[1:])),
            "seeds": len(seeds),
            "verdict": _verdict(mechanism.evidence(*shares)),
            "options": _options(mechanism.changed),
        }
    ]


def _variant(
    reference: xr.Dataset, changed: Mapping[str, Any], groups: Sequence[xr.Dataset]
) -> xr.Dataset | None:
    """The group that differs in these fields alone, the reference having none of them set."""
    wanted = _told(reference.attrs["config"])
    if any(wanted.get(name) == value for name, value in changed.items()):
        return None
    wanted |= changed
    return next((g for g in groups if _told(g.attrs["config"]) == wanted), None)


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None; `data_hash` goes with corpus and vocabulary."""
    return {n: v for n, v in config.items() if v is not None and n != "data_hash"}


def _decay(groups: Sequence[xr.Dataset | None]) -> float:
    """The largest weight decay that all have; 0 where there is none, or a group is missing."""
    of_each = [set() if g is None else set(g["weight_decay"].values.tolist()) for g in groups]
    return max(set.intersection(*of_each), default=0.0)


def _shares(group: xr.Dataset, reference: xr.Dataset, decay: float) -> dict[int, np.ndarray]:
    """s by bin of factor 2, by seed; NaN in bins without classes or no better than chance.

    Runs at decay 0 are the same whatever is decayed: the reference's stand for those of a group
    that has none.
    """
    own = (group["weight_decay"].values == 0).any()
    without = _by_seed(group if own else reference, 0.0)
    config = group.attrs["config"] | {"weight_decay": decay}
    if config.get("optimizer") != "adamw-cautious":
        # Whatever normalises the gradient, decoupled decay shrinks the weights by kappa.
        config["optimizer"] = "adamw"
    counts, at, vocab_size = group["class_count"].values, kappa(config), group.sizes["class"]
    found = {}
    for seed, loss in _by_seed(group, decay).items():
        if seed in without and at > 0 and len(without[seed]) == len(loss):
            known = np.where(np.isnan(loss) | np.isnan(without[seed]), 0, counts)
            pair = excess_loss(known, loss, without[seed])
            (found[seed],) = share_bins(pair, at, vocab_size=vocab_size)
    return found


def _by_seed(group: xr.Dataset, decay: float) -> dict[int, np.ndarray]:
    seeds = at_decay(group, "seed", decay).tolist()
    return dict(zip(seeds, at_decay(group, "loss", decay), strict=True))


def _verdict(evidence: np.ndarray) -> str:
    band = seed_band(evidence)
    mean, half = float(band.mean), float(band.half_width)
    if math.isnan(half):
        return ("holds" if mean > 0 else "refuted") + " (one seed)"
    return "open" if abs(mean) <= half else "holds" if mean > 0 else "refuted"


def _options(changed: Sequence[Mapping[str, Any]]) -> str:
    each = (
        " ".join(f"--{name.replace('_', '-')} {value}" for name, value in fields.items())
        for fields in changed
    )
    return "; ".join(each)


def mechanism_view(groups: Sequence[xr.Dataset]) -> TableView | None:
    """The table as text; None where the groups test no mechanism."""
    frame = mechanisms(*groups)
    if not len(frame):
        return None

    def cells(row: Any) -> list[str]:
        measured = "; ".join(map(_range, row.measured))
        return [
            *(row.mechanism, row.predicted, _range(row.reference), measured),
            *(str(row.seeds), row.verdict, row.options),
        ]

    return TableView(
        key="table-mechanisms",
        title="Which mechanism makes rare tokens pay",
        caption="s, the share of its margin's decay that a token suffers: of the rarest to the "
        "most frequent bin of factor 2, in the setting and where one thing is changed, mean over "
        "paired seeds. Predictions were written down before the runs; verdicts are of the 95 % "
        "interval over seeds.",
        head=["mechanism", "predicted", "s", "s changed", "seeds", "verdict", "changed"],
        bodies=[
            (f"{name}, λ = {decay:g}", [cells(row) for row in part.itertuples()])
            for (name, decay), part in frame.groupby(["runs", "weight_decay"], sort=False)
        ],
    )


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}"
