"""`python -m ufm train`: trainings of a table held against theory, as a table and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from ufm.counts_file import read_counts
from ufm.files import beside, write_csv
from ufm.training.equilibrium import (
    Prediction,
    amplitudes,
    l2_minimum,
    margin_kept,
    row_size,
    win_back_rate,
)
from ufm.training.settings import TableTraining, check_decay
from ufm.training.table import TrainedTable, train_table

FEWEST_BATCHES = 30
"""A class that occurs in fewer is left out of the verdict: chance decides where it ends."""
_DECAYS_L2 = (1e-3, 2e-3, 4e-3)
_DECAYS_ADAMW = (0.0, 5e-3)
_HEADER = (
    "weight_decay", "label", "count", "contexts", "batches", "loss", "predicted_loss", "margin",
    "predicted_margin", "share_lost", "predicted_share", "largest_entry", "constant_push",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a table of free features and hold the loss of every class against theory.

    SGD and Adam decay by L2, which ends at a closed form. AdamW decays decoupled and is held
    against two numbers a class in place of two rows, and a row that is pushed one way.
    """

    training: tyro.conf.OmitArgPrefixes[TableTraining] = field(default_factory=TableTraining)
    weight_decay: tuple[float, ...] | None = None
    """A training each; default 0.001 0.002 0.004, for adamw 0 0.005."""
    counts: Path | None = None
    """Class counts of a file (see `predict`) in place of class-counts; zeros are left out."""
    device: str = "auto"
    """Where to train: auto (a GPU if there is one), cpu, cuda, ..."""
    threads: int = 1
    """CPU threads."""
    output: Path = Path("train")
    """Stem of the files: .csv and .png are added."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """One training beside what theory says of it; NaN where it says nothing."""

    trained: TrainedTable
    undecayed: Comparison | None
    """The same training without decay, where there is one."""
    predicted: Prediction
    """L2: the closed form. AdamW: two numbers a class."""
    why_not: str
    """Why nothing is predicted; empty where something is."""
    constant_push: Float[Tensor, " V"]
    """AdamW: what the entries of a feature reach where the gradient lasts."""

    @property
    def largest_entry(self) -> Float[Tensor, " V"]:
        """Largest |entry| of the features of each class."""
        contexts = self.trained.training.contexts_of_class
        label = torch.repeat_interleave(torch.arange(len(contexts)), contexts)
        largest = self.trained.features.abs().amax(1)
        return torch.zeros(len(contexts)).double().scatter_reduce(0, label, largest, "amax")

    @property
    def share_lost(self) -> Float[Tensor, " V"]:
        """s in margin = margin without decay * exp(-kappa s)."""
        if self.undecayed is None:
            return torch.full_like(self.trained.margin, torch.nan)
        return _share(self.trained.margin / self.undecayed.trained.margin, self.trained.kappa)

    @property
    def predicted_share(self) -> Float[Tensor, " V"]:
        """AdamW: that s, by the rate of winning back where there is label noise to set it, else by
        two numbers a class."""
        trained, training = self.trained, self.trained.training
        if training.optimizer != "adamw" or self.undecayed is None:
            return torch.full_like(trained.margin, torch.nan)
        if training.label_noise and training.feature_kind != "nonnegative":
            factors = 1 if training.feature_kind == "normalized" else 2
            kept = margin_kept(trained.kappa, win_back_rate(training), factors=factors)
        else:
            kept = self.predicted.margin / self.undecayed.predicted.margin
        return _share(kept, trained.kappa)


def _share(kept: Float[Tensor, " V"], kappa: float) -> Float[Tensor, " V"]:
    return torch.where(kept > 0.0, kept, torch.nan).log() / (-kappa if kappa else torch.nan)


def compare(trained: TrainedTable, undecayed: Comparison | None = None) -> Comparison:
    """What theory says of where this training ended."""
    training, decay = trained.training, trained.weight_decay
    unknown = torch.full_like(trained.loss, torch.nan)
    predicted, why_not, push = Prediction(loss=unknown, margin=unknown), "", unknown
    try:
        predict = amplitudes if training.optimizer == "adamw" else l2_minimum
        predicted = predict(training, decay)
    except ValueError as error:
        why_not = str(error)
    if training.optimizer == "adamw" and training.feature_kind != "normalized":
        push = row_size(training, decay, training.share_of_steps)
    return Comparison(
        trained=trained,
        undecayed=undecayed,
        predicted=predicted,
        why_not=why_not,
        constant_push=push,
    )


def verdict(found: Comparison) -> str:
    """One line: how far classes are from the prediction (L2: in loss, AdamW: in margin)."""
    trained = found.trained
    line = f"weight decay {trained.weight_decay:g} (kappa {trained.kappa:.3g}): "
    judged = trained.batches >= FEWEST_BATCHES
    if found.why_not or not bool(judged.any()):
        why_not = found.why_not or f"no class occurs in {FEWEST_BATCHES} batches"
        line += f"nothing to hold it against: {why_not}"
    else:
        decoupled = trained.training.optimizer == "adamw"
        what, error = ("margin", _margin_error(found)) if decoupled else ("loss", _error(found))
        most, mean = float(error[judged].abs().max()), float(error[judged].abs().mean())
        line += f"{what} off by {most:.2%} at most and {mean:.2%} on average in the "
        line += f"{int(judged.sum())} classes that occur in {FEWEST_BATCHES} batches or more"
    if trained.training.optimizer == "adamw" and trained.weight_decay:
        largest = max(float(found.largest_entry.max()), float(trained.W.abs().max()))
        line += f"; largest |w| {largest:.3g}, 1/decay {1.0 / trained.weight_decay:.3g}"
    return line


def _error(found: Comparison) -> Float[Tensor, " V"]:
    return found.trained.loss / found.predicted.loss - 1.0


def _margin_error(found: Comparison) -> Float[Tensor, " V"]:
    return found.trained.margin / found.predicted.margin - 1.0


def train(options: Train) -> int:
    """Runs the command: trains, prints a verdict each, writes <output>.csv and .png."""
    if options.threads < 1:
        raise ValueError(f"threads is {options.threads}; expected a whole number >= 1")
    torch.set_num_threads(options.threads)
    training, labels = _classes(options)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    decays = options.weight_decay
    if decays is None:
        decays = _DECAYS_ADAMW if training.optimizer == "adamw" else _DECAYS_L2
    found: list[Comparison] = []
    for decay in sorted({check_decay(decay) for decay in decays}):
        trained = train_table(training, weight_decay=decay, device=device)
        undecayed = found[0] if found and not found[0].trained.weight_decay else None
        found.append(compare(trained, undecayed))
        print(verdict(found[-1]), flush=True)
    table, figure = options.output.with_suffix(".csv"), options.output.with_suffix(".png")
    write_csv(table, _HEADER, (row for one in found for row in _rows(one, labels)))
    _draw(figure, found)
    print(f"wrote {table} and {figure}")
    return 0


def _classes(options: Train) -> tuple[TableTraining, list[str]]:
    if options.counts is None:
        return options.training, [str(k) for k in range(len(options.training.counts))]
    labels, counts = read_counts(options.counts)
    kept = [k for k, count in enumerate(counts) if count > 0]
    training = replace(options.training, class_counts=tuple(counts[k] for k in kept))
    return training, [labels[k] for k in kept]


def _rows(found: Comparison, labels: Sequence[str]) -> list[tuple[object, ...]]:
    trained, training = found.trained, found.trained.training
    columns = (
        [trained.weight_decay] * len(labels),
        labels,
        training.counts.tolist(),
        training.contexts_of_class.tolist(),
        trained.batches.tolist(),
        trained.loss.tolist(),
        found.predicted.loss.tolist(),
        trained.margin.tolist(),
        found.predicted.margin.tolist(),
        found.share_lost.tolist(),
        found.predicted_share.tolist(),
        found.largest_entry.tolist(),
        found.constant_push.tolist(),
    )
    return [tuple(_cell(value) for value in row) for row in zip(*columns, strict=True)]


def _cell(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else repr(value)


def _draw(path: Path, found: Sequence[Comparison]) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [_draw_losses]
    if found[0].trained.training.optimizer != "adamw":
        panels.append(_draw_errors)
    if not bool(torch.isnan(found[0].constant_push).any()):
        panels.append(_draw_rows)
    if found[-1].undecayed is not None:
        panels.append(_draw_lost)
    figure = Figure(figsize=(4.8 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    colors = mpl.colormaps["viridis"](torch.linspace(0.0, 0.85, len(found)).numpy())
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, found, colors)
        axes.legend(fontsize="small")
    with beside(path) as part:
        figure.savefig(part, dpi=150, format="png")


def _curve(x: Tensor, y: Float[Tensor, " V"]) -> tuple[Tensor, Tensor]:
    """The mean of y at every different x, in order."""
    steps, which = torch.unique(x, return_inverse=True)
    sums = torch.zeros(len(steps)).double().index_add(0, which, y)
    return steps, sums / torch.bincount(which)


def _draw_losses(axes: Any, found: Sequence[Comparison], colors: Any) -> None:
    for one, color in zip(found, colors, strict=True):
        counts = one.trained.training.counts
        label = f"decay {one.trained.weight_decay:g}"
        axes.plot(counts, one.trained.loss, "o", ms=4, color=color, label=label)
        axes.plot(*_curve(counts, one.predicted.loss), color=color, lw=1)
    axes.set(xscale="log", yscale="log", xlabel="class count", ylabel="loss, nats")
    axes.set_title("trained (dots) and predicted (lines)")


def _draw_errors(axes: Any, found: Sequence[Comparison], colors: Any) -> None:
    for one, color in zip(found, colors, strict=True):
        label = f"decay {one.trained.weight_decay:g}"
        axes.plot(one.trained.batches, 100 * _error(one), "o", ms=4, color=color, label=label)
    axes.axhspan(-1, 1, color="0.9", zorder=0)
    axes.axvline(FEWEST_BATCHES, color="0.6", lw=1)
    axes.set(xscale="log", xlabel="batches with the class", ylabel="trained over predicted - 1, %")
    axes.set_title("distance from the closed form (band: 1 %)")


def _draw_rows(axes: Any, found: Sequence[Comparison], colors: Any) -> None:
    share = found[0].trained.training.share_of_steps
    for one, color in zip(found, colors, strict=True):
        label = f"decay {one.trained.weight_decay:g}"
        axes.plot(share, one.largest_entry, "o", ms=4, color=color, label=label)
        axes.plot(*_curve(share, one.constant_push), color=color, lw=1)
    axes.set(xscale="log", yscale="log", xlabel="share of the steps with the context")
    axes.set_ylabel("largest |entry| of the features of a class")
    axes.set_title("rows, and rows pushed one way (lines)")


def _draw_lost(axes: Any, found: Sequence[Comparison], colors: Any) -> None:
    for one, color in zip(found, colors, strict=True):
        if one.undecayed is not None:
            counts = one.trained.training.counts
            label = f"$\\kappa$ {one.trained.kappa:.2g}"
            axes.plot(counts, one.share_lost, "o", ms=4, color=color, label=label)
            axes.plot(*_curve(counts, one.predicted_share), color=color, lw=1)
    axes.set(xscale="log", xlabel="class count", ylabel="s in M = M(0) exp(-$\\kappa$ s)")
    axes.set_title("share of the margin that decay takes")
