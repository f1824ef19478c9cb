"""Floor, excess and law of comparable runs by weight decay, and what the margin law predicts.

Each run with decay is paired with the run at decay 0 of its seed; the laws are fitted to the mean
excess over the pairs. Where something is lacking, a sentence says what.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from frequency_bins import (
    ExcessLoss,
    FrequencyBins,
    compare_laws_over_bins,
    excess_loss,
    fit_excess_loss,
    predict_bins,
)

LAW = ("amplitude", "saturation_count", "exponent", "r_squared")
SYMBOLS = {"amplitude": "A", "saturation_count": "n_0", "exponent": "p"}
BY_OCTAVE = ("octave_count", "floor", "excess", "excess_half_width")
PREDICTIONS = ("measured", "first_order", "second_order")


def excess_variables(group: xr.Dataset) -> xr.Dataset:
    """What `group_dataset` of these runs gains: dims decayed (weight decays above 0) and octave.

    octave_low: the smallest count of a bin of factor 2. By decay and octave: octave_count (mean
    over its tokens), floor, excess with its 95 % half width over the pairs (NaN for one), and,
    beside what was `measured`, the losses predicted by the margin law from the smallest decay that
    has a kappa (`predicted_from`), of the seeds that both have. By decay: pairs, the saturating
    law's numbers `law` and `law_error` over `number`, `preferred` (of three laws, by leaving bins
    out) and, where there is no excess or no law, `excess_note`, the reason. Losses in nats. A class
    without a loss in one of the runs is left out of all.
    """
    whole, loss = group["class_count"].values, group["loss"].values
    counts = np.where(np.isnan(loss).any(axis=0), 0, whole)
    octaves = FrequencyBins.powers(whole, base=2)
    decays = np.unique(group["weight_decay"].values)
    decays = decays[decays > 0]
    shape = len(decays), len(octaves)
    by_octave = {name: np.full(shape, math.nan) for name in (*BY_OCTAVE, *PREDICTIONS)}
    law = np.full((2, len(decays), len(LAW)), math.nan)
    pairs, notes, preferred = np.zeros(len(decays), dtype=int), [""] * shape[0], [""] * shape[0]
    start = _start(group, counts, decays)
    for place, decay in enumerate(decays):
        try:
            seeds, excess = _paired(group, counts, decay)
            pairs[place] = len(seeds)
            found = _by_octave(excess)
            if start and decay > start.decay:
                found |= _predicted(group, counts, decay, start)
            for name, values in found.items():
                by_octave[name][place, : len(values)] = values
            law[:, place], preferred[place] = _law(counts, excess)
        except ValueError as error:
            notes[place] = str(error)
    return xr.Dataset(
        {
            **{name: (("decayed", "octave"), values) for name, values in by_octave.items()},
            "law": (("decayed", "number"), law[0]),
            "law_error": (("decayed", "number"), law[1]),
            "pairs": ("decayed", pairs),
            "preferred": ("decayed", np.array(preferred, dtype=str)),
            "excess_note": ("decayed", np.array(notes, dtype=str)),
            "predicted_from": start.decay if start else math.nan,
        },
        coords={
            "decayed": decays,
            "octave_low": ("octave", np.array(octaves.edges[:-1])),
            "octave_high": ("octave", np.array(octaves.edges[1:])),
            "number": list(LAW),
        },
    )


def decays_with_excess(group: xr.Dataset) -> list[float]:
    """Weight decays above 0 that have a run of the same seed at decay 0."""
    return [float(decay) for decay in group["decayed"].values[group["pairs"].values > 0]]


def predicted_decays(group: xr.Dataset) -> list[float]:
    """Weight decays whose losses the margin law predicts from a smaller one."""
    known = group["second_order"].notnull().any("octave").values
    return [float(decay) for decay in group["decayed"].values[known]]


def why_no_excess(group: xr.Dataset) -> str:
    """What a group lacks that no weight decay has an excess; "" where one has."""
    if decays_with_excess(group):
        return ""
    notes = group["excess_note"].values.tolist()
    return notes[0] if notes else "no run with weight decay"


def fitted_law(group: xr.Dataset, decay: float) -> tuple[dict[str, float], dict[str, float]]:
    """The law's numbers at a weight decay, and their standard errors, by the names in `LAW`."""
    cell = group.sel(decayed=decay)
    numbers, errors = (
        dict(zip(LAW, cell[v].values.tolist(), strict=True)) for v in ("law", "law_error")
    )
    return numbers, errors


def law_number(value: float, error: float, form: str = ".3g") -> str:
    """A number of the law ± its standard error; "open" where the record leaves it open."""
    if math.isnan(value):
        return "–"
    return f"{value:{form}} ± {error:.2g}" if math.isfinite(error) else "open"


def law_lines(law: Mapping[str, float], errors: Mapping[str, float]) -> list[str]:
    """A, n_0 and p as a figure shows them."""
    shown = {s: law_number(law[name], errors[name]) for name, s in SYMBOLS.items()}
    return [f"{s} {text}" if text == "open" else f"{s} = {text}" for s, text in shown.items()]


@dataclass(frozen=True, kw_only=True)
class _Start:
    """The smallest weight decay that losses are predicted from."""

    decay: float
    kappa: float
    seeds: Sequence[int]


def _start(group: xr.Dataset, counts: np.ndarray, decays: np.ndarray) -> _Start | None:
    for decay in decays:
        kappa = _kappa(group, decay)
        try:
            seeds, _ = _paired(group, counts, decay)
        except ValueError:
            continue
        if kappa > 0:
            return _Start(decay=float(decay), kappa=kappa, seeds=seeds)
    return None


def _kappa(group: xr.Dataset, decay: float) -> float:
    return float(group["kappa"].values[group["weight_decay"].values == decay][0])


def _paired(
    group: xr.Dataset, counts: np.ndarray, decay: float, among: Sequence[int] | None = None
) -> tuple[list[int], ExcessLoss]:
    """The seeds (of `among`) that have a run at a decay and one without, and their excess."""
    without, at = _losses(group, 0.0), _losses(group, decay)
    if not without:
        raise ValueError("no run at decay 0")
    seeds = [seed for seed in at if seed in without and (among is None or seed in among)]
    if not seeds:
        raise ValueError("no run at decay 0 of the same seed")
    for losses, value in ((without, 0.0), (at, decay)):
        for seed in seeds:
            if len(losses[seed]) > 1:
                raise ValueError(f"{len(losses[seed])} runs at decay {value:g} with seed {seed}")
    sides = (np.stack([losses[seed][0] for seed in seeds]) for losses in (at, without))
    return seeds, excess_loss(counts, *sides)


def _losses(group: xr.Dataset, decay: float) -> dict[int, list[np.ndarray]]:
    """(class) of the runs at a decay, by seed."""
    found: dict[int, list[np.ndarray]] = {}
    chosen = group["weight_decay"].values == decay
    for seed, loss in zip(
        group["seed"].values[chosen].tolist(), group["loss"].values[chosen], strict=True
    ):
        found.setdefault(seed, []).append(loss)
    return found


def _by_octave(excess: ExcessLoss) -> dict[str, np.ndarray]:
    band = excess.excess_band()
    values = (excess.bin_count, excess.floor_band().mean, band.mean, band.half_width)
    return dict(zip(BY_OCTAVE, values, strict=True))


def _law(counts: np.ndarray, excess: ExcessLoss) -> tuple[np.ndarray, str]:
    """Numbers and errors (2, number) of the saturating law, and the law that is preferred."""
    mean = excess.excess.mean(axis=0)
    fit = fit_excess_loss(counts, mean)
    numbers = [[getattr(of, name) for name in LAW] for of in (fit, fit.standard_errors)]
    try:
        preferred = compare_laws_over_bins(counts, mean, vocab_size=len(counts)).preferred
    except ValueError:
        preferred = ""
    return np.array(numbers), preferred


def _predicted(
    group: xr.Dataset, counts: np.ndarray, decay: float, start: _Start
) -> dict[str, np.ndarray]:
    """Mean losses by octave, measured at a decay and predicted by both orders of the margin law."""
    kappa = _kappa(group, decay)
    if not kappa > 0 or not set(start.seeds) & set(_losses(group, decay)):
        return {}
    seeds, excess = _paired(group, counts, decay, among=start.seeds)
    _, pairs = _paired(group, counts, start.decay, among=seeds)
    orders = [
        predict_bins(pairs, start.kappa, kappa, vocab_size=len(counts), second_order=second).mean(
            axis=0
        )
        for second in (False, True)
    ]
    measured = (excess.bin_floor + excess.bin_excess).mean(axis=0)
    return dict(zip(PREDICTIONS, (measured, *orders), strict=True))
