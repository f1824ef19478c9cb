"""The labelled datasets that figures and tables read, one for each set of comparable runs.

Their names, and what is read of them: values and means by weight decay, bins, counts, labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy.special import stdtrit  # scipy.stats would take a second to import

from frequency_bins import seed_band
from reports.last_layers import NORMS
from reports.wording import is_of_text

REPAIRS = {"loss_weight_exponent": 0, "decay": "all"}  # with the values that repair nothing
MOST_NAMED_CLASSES = 50


def group_dataset(config: Mapping[str, Any], runs: Sequence[xr.Dataset]) -> xr.Dataset:
    """Comparable runs along `run`, by weight decay and seed; `config` is what they share.

    Dims run, class, bin, checkpoint. Per class: loss, accuracy (final), learning_speed,
    windows_seen (share of the windows that saw it), test_accuracy (last window, NaN without test
    data), trajectory (checkpoint, class). Per bin: bin_loss, bin_accuracy, bin_learning_speed,
    bin_speed_carried_back (see `carry_back`), bin_windows_seen, each with _std over the classes.
    Per run: average_loss, token_balanced_loss, token_balanced_perplexity, token_balanced_accuracy,
    fairness_gap and its half width, critical_count, r_squared, neglected, predicted_neglected,
    kappa (weight decay times the sum of the learning rates; NaN without decoupled decay of AdamW),
    tasks and text_loss (see `reports.tasks`). Losses in nats. Runs whose seed shuffled the counts
    have ranks for classes; see `by_rank`.
    """
    runs = sorted(runs, key=lambda run: run.attrs["cell"])
    decays, seeds = zip(*(run.attrs["cell"] for run in runs), strict=True)
    first = runs[0]
    return xr.Dataset(
        {
            name: (("run", *first[name].dims), np.stack([run[name].values for run in runs]))
            for name in first.data_vars
        },
        coords={
            **first.coords,
            "run": ("run", [run.attrs["run"] for run in runs]),
            "weight_decay": ("run", list(decays)),
            "seed": ("run", list(seeds)),
        },
        attrs={
            "config": dict(config),
            "class_names": first.attrs["class_names"],
            "never_occurring": int((first["class_count"].values == 0).sum()),
        },
    )


def named(groups: Sequence[xr.Dataset]) -> tuple[xr.Dataset, ...]:
    """Text before images, each in order of names that tell its groups apart."""
    images = [group for group in groups if not is_of_text(group)]
    return *_named_alike([g for g in groups if is_of_text(g)]), *_named_alike(images)


def _named_alike(groups: Sequence[xr.Dataset]) -> tuple[xr.Dataset, ...]:
    """Groups in order of their names: the model, then whatever field differs.

    A value that most of at least three groups have goes without saying.
    """
    configs = [group.attrs["config"] for group in groups]
    names = [display_text(str(config.get("model", "model"))) for config in configs]
    fields = sorted(
        {name for config in configs for name in config} - {"model"},
        key=lambda field: (max(len(str(_field(config, field))) for config in configs), field),
    )
    for field in fields:
        if len(set(names)) == len(names):
            break
        shown = [_shown(_field(config, field)) for config in configs]
        told = {(name, value) for name, value in zip(names, shown, strict=True)}
        if len(told) > len(set(names)):
            label = display_text(field.replace("_", " "))
            usual, number = Counter(shown).most_common(1)[0]
            if field in REPAIRS:
                usual = _shown(REPAIRS[field])
            elif not 2 * number > len(shown) > 2:
                usual = "False"
            plain = {usual, "None"}  # a field that a config lacks is not in its name
            names = [
                name if value in plain else f"{name}, {label} {value}".removesuffix(" True")
                for name, value in zip(names, shown, strict=True)
            ]
    twice = {name for name in names if names.count(name) > 1}  # same settings, other data
    names = [f"{name} (data {i})" if name in twice else name for i, name in enumerate(names, 1)]
    for group, name in zip(groups, names, strict=True):
        group.attrs["name"] = name
    return tuple(sorted(groups, key=lambda group: group.attrs["name"]))


def _field(config: Mapping[str, Any], field: str) -> Any:
    """A field; that of no repair where a config has no such field."""
    return config.get(field, REPAIRS.get(field))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else display_text(str(value))


def weight_decays(groups: Iterable[xr.Dataset]) -> list[float]:
    """Every weight decay of the groups, ascending."""
    return sorted({float(decay) for group in groups for decay in group["weight_decay"].values})


def at_decay(group: xr.Dataset, name: str, weight_decay: float) -> np.ndarray:
    """(run, ...): a variable of the runs at one weight decay."""
    return np.asarray(group[name].values[group["weight_decay"].values == weight_decay])


def over_seeds(group: xr.Dataset, name: str) -> xr.Dataset:
    """Mean, std (ddof = 1) and 95 % half width over the seeds of a variable, by weight decay.

    Dims: weight_decay and whatever `name` has beside run. `n` is the number of runs behind each
    weight decay; with one run std and half_width are NaN.
    """
    decays = np.unique(group["weight_decay"].values)
    values = [at_decay(group, name, decay) for decay in decays]
    bands = [seed_band(of_runs) for of_runs in values]
    dims = ("weight_decay", *(dim for dim in group[name].dims if dim != "run"))
    return xr.Dataset(
        {
            part: (dims, np.stack([getattr(band, part) for band in bands]))
            for part in ("mean", "std", "half_width")
        }
        | {"n": ("weight_decay", [len(of_runs) for of_runs in values])},
        coords={"weight_decay": decays},
    )


def seed_mean(group: xr.Dataset, name: str, weight_decay: float) -> np.ndarray:
    """A variable at one weight decay, mean over seeds: without `run`, what dims it has."""
    if f"mean_{name}" in group:
        return np.asarray(group[f"mean_{name}"].sel(decay=weight_decay).values)
    return np.asarray(at_decay(group, name, weight_decay).mean(axis=0))


def for_drawing(group: xr.Dataset) -> xr.Dataset:
    """The group with what figures read of its classes: means over seeds instead of every run.

    A group of few classes keeps `test_accuracy` and `label`, which Figure 9 shows.
    """
    decays = weight_decays([group])
    means = {
        f"mean_{name}": (("decay", "class"), np.stack([seed_mean(group, name, d) for d in decays]))
        for name in ("loss", "accuracy", "learning_speed")
    }
    few = group.sizes["class"] <= MOST_NAMED_CLASSES
    kept = {"test_accuracy", "class_index", *NORMS} if few else set()
    by_run = [n for n, v in group.data_vars.items() if {"run", "class"} <= {*v.dims}]
    dropped = [*(n for n in by_run if n not in kept), *([] if few else ["label"])]
    return group.drop_vars(dropped).assign(means).assign_coords(decay=decays)


def welch_half_width(first: np.ndarray, second: np.ndarray) -> float:
    """95 % half width of the difference of two means; NaN where one is of a single value."""
    if min(len(first), len(second)) < 2:
        return math.nan
    parts = [float(values.var(ddof=1)) / len(values) for values in (first, second)]
    if sum(parts) == 0:
        return 0.0
    degrees = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True)
    )
    return float(stdtrit(degrees, 0.975)) * math.sqrt(sum(parts))


def loss_weight_exponent(config: Mapping[str, Any]) -> float:
    """g of the loss weights n_k^-g; 0 where the config has none."""
    return float(config.get("loss_weight_exponent") or 0)


def effective_counts(at: np.ndarray, counts: np.ndarray, exponent: float) -> np.ndarray:
    """a^2 n at the counts `at`: where the unweighted law has the loss that weights a ~ n^-g give.

    a_k is scaled so that sum a_k n_k = N over `counts` (ufm/THEORY.md, section 6: r_k holds
    a_k sqrt(n_k)). Zero counts stay zero.
    """
    n = counts[counts > 0].astype(np.float64)
    scale = n.sum() / (n ** (1 - exponent)).sum()
    powers = np.power(at, 1 - 2 * exponent, where=at > 0, out=np.zeros(len(at)))
    return np.asarray(scale**2 * powers)


def has_windows(group: xr.Dataset) -> bool:
    """Whether it holds what happened during training: not where a single window was recorded."""
    return bool(group["bin_learning_speed"].notnull().any())


def end_bins(group: xr.Dataset) -> tuple[int, int]:
    """Positions of the rarest and of the most frequent bin that hold classes."""
    held = np.flatnonzero(group["bin_size"].values > 0)
    return int(held[0]), int(held[-1])


def bin_range(group: xr.Dataset, place: int) -> str:
    """The counts of the bin at a place, as `count_range` writes them."""
    return count_range(*(int(group[end].values[place]) for end in ("bin_low", "bin_high")))


def count_range(low: int, high: int) -> str:
    """The counts low <= n < high as people write them: "1–2", "3–8", "5"."""
    return f"{low:,}" if high - low == 1 else f"{low:,}–{high - 1:,}"


def corpus(group: xr.Dataset) -> str:
    """The name of the data a group was trained on."""
    config = group.attrs["config"]
    return display_text(str(config.get("corpus") or config.get("dataset") or "an unnamed corpus"))


def describe(group: xr.Dataset, *, seeds_too: bool = True) -> str:
    """What a group was run on, for captions: "imdb, 600 steps, V = 32,005, seed 0 (n = 1 ...)"."""
    config = group.attrs["config"]
    parts = [corpus(group)]
    parts += [
        f"{config[name]:,} {name}"
        for name in ("steps", "epochs")
        if seeds_too and isinstance(config.get(name), int)
    ]
    parts.append(f"V = {group.sizes['class']:,}")
    if seeds_too:
        seeds = sorted(set(group["seed"].values.tolist()))
        _, numbers = np.unique(group["weight_decay"].values, return_counts=True)
        shown = (
            f"{numbers.min()}"
            if numbers.min() == numbers.max()
            else (f"{numbers.min()} to {numbers.max()}")
        )
        word = "seed" if len(seeds) == 1 else "seeds"
        parts.append(f"{word} {', '.join(map(str, seeds))} (n = {shown} per weight decay)")
    return ", ".join(parts)


def display_text(text: str) -> str:
    """Text from data with unprintable characters (and lone surrogates) written out."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def display_label(label: str) -> str:
    """A class label as people can read it; a space, which is part of many tokens, shows as ␣."""
    return display_text(label).replace(" ", "␣") or "(empty)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
