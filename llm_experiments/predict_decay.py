"""What a study's runs at decay 0 and at a small decay predict for others, by the margin law.

Per bin of factor 2, of runs that differ in weight decay and seed alone; see
`frequency_bins.predict_loss`. Nothing is trained, and the runs at larger decays are not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int64
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from frequency_bins import ExcessLoss, SeedBand, excess_loss, predict_bins, seed_band
from llm_experiments.training.kappa import kappa
from run_store import Run, read_study
from run_store.command_line import check_finite, parse_options, printable
from run_store.input_files import is_integer, is_number
from run_store.shrunken import ShrunkenRun, shrunken_runs

_NEEDED = ("class_count", "final_loss")
_SWEPT = ("weight_decay", "seed")


@dataclass(frozen=True, kw_only=True, eq=False)
class DecayPrediction:
    """Mean losses in nats of K bins of factor 2, of one setting of a study."""

    setting: str
    seeds: tuple[int, ...]
    """Those that have both runs."""
    weight_decay: float
    """The small one, which all is predicted from."""
    kappa: float
    pairs: ExcessLoss
    second_order: bool
    predicted: dict[float, SeedBand]
    """By weight decay."""


def predict_decay(
    folder: Path, weight_decays: Sequence[float], *, second_order: bool = True
) -> tuple[list[DecayPrediction], list[str]]:
    """For each setting of a study the losses at `weight_decays`, or why there are none.

    The small decay is the least above 0 of which a seed has a run at decay 0 too. Raises
    ValueError for a folder that is no study, a study of which no setting can be predicted (the
    last reason), no weight decays and one that is negative or not finite.
    """
    if not weight_decays:
        raise ValueError("no weight decay is given; expected at least one")
    for decay in weight_decays:
        check_finite("weight_decay", decay)
    settings: dict[str, list[tuple[Run | ShrunkenRun, dict[str, Any]]]] = {}
    study = read_study(folder, check_records=False)
    found, reasons = [], [f"{path.name}: {reason}" for path, reason in study.problems]
    for run in (*study.runs, *shrunken_runs(folder)):
        try:
            config = run.manifest["config"]
        except (ValueError, OSError) as error:
            reasons.append(str(error))
            continue
        if not (is_number(config.get("weight_decay")) and is_integer(config.get("seed"))):
            reasons.append(f"{run.id}: its config has no weight_decay and seed")
            continue
        shared = {name: value for name, value in config.items() if name not in _SWEPT}
        settings.setdefault(json.dumps(shared, sort_keys=True), []).append((run, config))
    if not settings:
        raise ValueError(f"{folder} holds no finished run; expected one at decay 0 and one above")
    for members, name in zip(settings.values(), _names(list(settings)), strict=True):
        try:
            found.append(_predict(name, members, weight_decays, second_order))
        except (ValueError, OSError) as error:
            reasons.append(f"{name}: {error}")
    if not found:
        raise ValueError(reasons[-1])
    return found, reasons


def _predict(
    name: str,
    runs: Sequence[tuple[Run | ShrunkenRun, dict[str, Any]]],
    weight_decays: Sequence[float],
    second_order: bool,
) -> DecayPrediction:
    small, seeds = _pairs([config for _, config in runs])
    by_cell = {(config["weight_decay"], config["seed"]): run for run, config in runs}
    with_decay, without = ([_final(by_cell[decay, seed]) for seed in seeds] for decay in (small, 0))
    counts = with_decay[0][0]
    for other, _ in (*with_decay, *without):
        if not np.array_equal(other, counts):
            raise ValueError("its runs have different class counts; expected one corpus")
    losses = [np.stack([loss for _, loss in side]) for side in (with_decay, without)]
    unknown = np.isnan(losses).any(axis=(0, 1))
    pairs = excess_loss(np.where(unknown, 0, counts), *losses)
    config = next(config for _, config in runs if config["weight_decay"] == small)
    at = kappa(config)
    if not at > 0:
        raise ValueError("its decay is not AdamW's decoupled one, of which alone the law speaks")
    predicted = {
        decay: seed_band(
            predict_bins(
                pairs,
                at,
                kappa(config | {"weight_decay": decay}),
                vocab_size=len(counts),
                second_order=second_order,
            )
        )
        for decay in weight_decays
    }
    return DecayPrediction(
        setting=name,
        seeds=tuple(seeds),
        weight_decay=small,
        kappa=at,
        pairs=pairs,
        second_order=second_order,
        predicted=predicted,
    )


def _pairs(configs: Sequence[dict[str, Any]]) -> tuple[float, list[int]]:
    """The least weight decay above 0 that a run without has a seed in common with, and the seeds.

    Raises ValueError where there is none.
    """
    without = {config["seed"] for config in configs if config["weight_decay"] == 0}
    decays = sorted({config["weight_decay"] for config in configs if config["weight_decay"] > 0})
    if not without:
        raise ValueError("no run at decay 0; expected one, and one at a small decay")
    if not decays:
        raise ValueError("no run with weight decay; expected one at a small decay")
    for decay in decays:
        seeds = {config["seed"] for config in configs if config["weight_decay"] == decay}
        if both := sorted(seeds & without):
            return decay, both
    raise ValueError("no seed has a run at decay 0 and one above; expected one that has both")


def _final(run: Run | ShrunkenRun) -> tuple[Int64[np.ndarray, " V"], Float[np.ndarray, " V"]]:
    record = run.classes(only=_NEEDED)
    if "final_loss" not in record:
        raise ValueError(f"run {run.id} has no final losses; expected --evaluate final")
    return record["class_count"].values, record["final_loss"].values.astype(np.float64)


def _names(settings: Sequence[str]) -> list[str]:
    """The model and whatever fields differ."""
    configs = [json.loads(config) for config in settings]
    fields = sorted({name for config in configs for name in config} - {"model"})
    told = [name for name in fields if len({json.dumps(c.get(name)) for c in configs}) > 1]
    return [
        printable(
            ", ".join(
                [str(config.get("model", "model"))]
                + [f"{n.replace('_', ' ')} {config[n]}" for n in told if config.get(n) is not None]
            )
        )
        for config in configs
    ]


@dataclass(frozen=True, kw_only=True)
class PredictDecay:
    """Losses by token frequency at weight decays that were not run, from those of a small one."""

    study: Positional[Path]
    """folder of a study with runs at decay 0 and at a small decay; or of their small files"""
    weight_decays: Annotated[tuple[float, ...], arg(name="weight-decay")]
    """one or more weight decays to predict"""
    first_order: bool = False
    """by the margin law of first order, for which a token's share is the same at every decay"""


def predict_decay_command(program: str, argv: list[str]) -> int:
    """Print `predict_decay` of a study: a table for each of its settings."""
    options = parse_options(PredictDecay, argv, prog=f"{program} predict-decay")
    found, reasons = predict_decay(
        options.study, options.weight_decays, second_order=not options.first_order
    )
    console = Console(highlight=False, markup=False)
    for prediction in found:
        console.print(_table(prediction), _summary(prediction), sep="\n", soft_wrap=True)
    for reason in reasons:
        console.print(f"not predicted: {printable(reason)}", soft_wrap=True)
    return 0


def _table(prediction: DecayPrediction) -> Table:
    pairs, bins = prediction.pairs, prediction.pairs.bins
    measured = [pairs.floor_band(), seed_band(pairs.bin_floor + pairs.bin_excess)]
    small = f"{prediction.weight_decay:g}"
    table = Table(title=prediction.setting, title_justify="left", box=None, pad_edge=False)
    for heading in ("times seen", "tokens", "decay 0", f"decay {small}"):
        table.add_column(heading, justify="right", no_wrap=True)
    for decay in prediction.predicted:
        table.add_column(f"{decay:g} predicted", justify="right", no_wrap=True)
    for place, size in enumerate(bins.sizes.tolist()):
        if size:
            low, high = bins.edges[place], bins.edges[place + 1] - 1
            bands = [*measured, *prediction.predicted.values()]
            table.add_row(
                f"{low:,}" if low == high else f"{low:,}-{high:,}",
                f"{size:,}",
                *(_with_interval(band.mean[place], band.half_width[place]) for band in bands),
            )
    return table


def _with_interval(mean: float, half_width: float) -> str:
    if np.isnan(mean):
        return "-"
    return f"{mean:.4f}" if np.isnan(half_width) else f"{mean:.4f} +- {half_width:.4f}"


def _summary(prediction: DecayPrediction) -> str:
    order = "second" if prediction.second_order else "first"
    seeds = ", ".join(map(str, prediction.seeds))
    interval = "; +-: 95 % interval over seeds" if len(prediction.seeds) > 1 else ""
    return (
        f"Mean losses in nats. Margin law of {order} order from decay {prediction.weight_decay:g}, "
        f"kappa {prediction.kappa:.4g}; seed {seeds}{interval}. -: no better than chance, of which "
        "the law says nothing."
    )
