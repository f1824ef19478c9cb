"""What was measured of a model, item by item, as a file beside it, and scores with intervals.

Read by `reports` too, so neither torch's models nor transformers are imported here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from frequency_bins import PairedBand, paired_band
from run_store import write_atomically
from run_store.input_files import read_file

FILE = "downstream.safetensors"
_MOST_BYTES = 2**31
_BIN_BASE = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Downstream:
    """R test reviews, their M next tokens and W words of more than one token.

    Counts are those of training: `token_count` of the next token, `word_count` of the word's
    tokens in a row. Ranks are 1 where the model puts the true token first; that of a word is the
    largest of its tokens after the first, each given those before it. Losses in nats.
    """

    sentiment_correct: np.ndarray
    """(R,) uint8: whether the classifier of frozen features is right"""
    sentiment_rarity: np.ndarray
    """(R,) float32: mean log training count of the review's tokens, never seen ones as once"""
    token_review: np.ndarray
    """(M,) int32: which review it is of"""
    token_count: np.ndarray
    """(M,) int64"""
    token_rank: np.ndarray
    """(M,) int32"""
    token_loss: np.ndarray
    """(M,) float32"""
    word_review: np.ndarray
    """(W,) int32"""
    word_count: np.ndarray
    """(W,) int64"""
    word_rank: np.ndarray
    """(W,) int32"""

    def same_items(self, other: Downstream) -> bool:
        """Whether both were asked the same, so that they can be compared item by item."""
        names = ("token_review", "token_count", "word_review", "word_count", "sentiment_rarity")
        return all(np.array_equal(getattr(self, n), getattr(other, n)) for n in names)


_TYPES = {
    "sentiment_correct": np.uint8, "sentiment_rarity": np.float32, "token_review": np.int32,
    "token_count": np.int64, "token_rank": np.int32, "token_loss": np.float32,
    "word_review": np.int32, "word_count": np.int64, "word_rank": np.int32,
}  # fmt: skip


def write_downstream(folder: Path, measured: Downstream) -> Path:
    """Write the file into a run's folder, or any other."""
    arrays = {f.name: getattr(measured, f.name).astype(_TYPES[f.name]) for f in fields(Downstream)}
    write_atomically(folder / FILE, save(arrays, metadata={"format": "1"}))
    return folder / FILE


def read_downstream(folder: Path) -> Downstream | None:
    """What `write_downstream` wrote into a folder; None without such a file.

    Raises ValueError, naming the file, for anything else under its name.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        arrays = load(read_file(path, most_bytes=_MOST_BYTES))
    except (SafetensorError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of results: {error}") from None
    sizes = {name: arrays[name].shape for name in _TYPES if name in arrays}
    if set(arrays) != set(_TYPES) or any(
        arrays[name].dtype != kind or arrays[name].ndim != 1 for name, kind in _TYPES.items()
    ):
        raise ValueError(f"{path} holds {sorted(arrays)}; expected the arrays of `downstream`")
    for part in ("sentiment", "token", "word"):
        own = {size for name, size in sizes.items() if name.startswith(f"{part}_")}
        if len(own) != 1:
            raise ValueError(f"{path}: the arrays of {part} have the shapes {sorted(own)}")
    for part in ("token", "word"):
        ranks, counts, of = (arrays[f"{part}_{name}"] for name in ("rank", "count", "review"))
        in_range = (of >= 0) & (of < sizes["sentiment_correct"][0])
        if not ((ranks > 0) & (counts >= 0) & in_range).all():
            raise ValueError(f"{path}: a rank below 1, a count below 0 or a review that is none")
    if not (
        np.isfinite(arrays["sentiment_rarity"]).all() and np.isfinite(arrays["token_loss"]).all()
    ):
        raise ValueError(f"{path}: a loss or a rarity that is not finite")
    return Downstream(**arrays)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One score: the mean of an item's value over some of the items."""

    task: str
    part: str
    """which items"""
    score: str

    @property
    def name(self) -> str:
        """All three."""
        return f"{self.task}, {self.part}: {self.score}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Items:
    """Values (N,) of the items of a measure, and which review each is of."""

    values: np.ndarray
    reviews: np.ndarray


def measures(measured: Downstream) -> Iterator[tuple[Measure, Items]]:
    """Every score of a model with its items; parts without any item are left out."""
    rarity = measured.sentiment_rarity
    reviews = np.arange(len(rarity))
    low, high = np.quantile(rarity, (0.25, 0.75))
    parts = {"all": rarity == rarity, "rarest quarter": rarity <= low}
    parts["most frequent quarter"] = rarity >= high
    correct = {"accuracy": measured.sentiment_correct.astype(np.float64)}
    yield from _of_parts("sentiment", parts, correct, reviews)
    counts = measured.token_count
    parts = {"all": counts >= 0, "never seen": counts == 0} | _bins(counts)
    scores = _ranked(measured.token_rank) | {"loss (nats)": measured.token_loss.astype(np.float64)}
    yield from _of_parts("next token", parts, scores, measured.token_review)
    counts = measured.word_count
    parts = {"all": counts >= 0, "never seen": counts == 0}
    parts |= {"seen 1–3×": (counts > 0) & (counts <= 3), "seen more often": counts > 3}
    yield from _of_parts("word", parts, _ranked(measured.word_rank), measured.word_review)


def _ranked(ranks: np.ndarray) -> dict[str, np.ndarray]:
    recalls = {f"recall at {k}": (ranks <= k).astype(np.float64) for k in (1, 10)}
    return {"mean reciprocal rank": 1.0 / ranks} | recalls


def _bins(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Bins 1–2, 3–8, 9–26, ... of training counts."""
    powers = math.ceil(math.log(max(int(counts.max(initial=0)), 1) + 1, _BIN_BASE))
    edges = [_BIN_BASE**power for power in range(powers + 1)]
    return {
        f"seen {low:,}–{high - 1:,}×": (counts >= low) & (counts < high)
        for low, high in itertools.pairwise(edges)
    }


def _of_parts(
    task: str,
    parts: dict[str, np.ndarray],
    scores: dict[str, np.ndarray],
    reviews: np.ndarray,
) -> Iterator[tuple[Measure, Items]]:
    for part, members in parts.items():
        for score, values in scores.items():
            if members.any():
                measure = Measure(task=task, part=part, score=score)
                yield measure, Items(values=values[members], reviews=reviews[members])


def scores(measured: Downstream) -> dict[Measure, float]:
    """The mean of every measure."""
    return {measure: float(items.values.mean()) for measure, items in measures(measured)}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A measure of two settings, of the same items and seeds."""

    measure: Measure
    first: float
    second: float
    band: PairedBand
    """second less first, with its 95 % interval over the reviews (and the seeds)"""
    items: int
    seeds: int


def differences(first: Sequence[Downstream], second: Sequence[Downstream]) -> list[Difference]:
    """Every measure of two settings, seed by seed and item by item.

    Raises ValueError for other numbers of seeds, or models that were asked other items.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} models; expected pairs, at least one")
    if not all(other.same_items(first[0]) for other in (*first, *second)):
        raise ValueError("the models were asked different items; expected one --reviews for all")
    sides = [[dict(measures(model)) for model in side] for side in (first, second)]
    found = []
    for measure, items in sides[0][0].items():
        low, high = (np.stack([m[measure].values for m in side]) for side in sides)
        found.append(
            Difference(
                measure=measure,
                first=float(low.mean()),
                second=float(high.mean()),
                band=paired_band(high - low, items.reviews),
                items=low.shape[1],
                seeds=len(low),
            )
        )
    return found
