"""Two checkpoints on one text, token by token: who pays for what was changed?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from frequency_bins import (
    FrequencyBins,
    SaturatingFit,
    fit_excess_loss,
    learning_speed,
    paired_band,
)
from llm_experiments.audit.result import TokenAudit, by_frequency


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The loss of a model less that of another, in nats: positive where the first loses."""

    bins: pd.DataFrame
    """A row a bin of training counts, and "all": bin, measured, difference (mean over the next
    tokens), low and high (its 95 % interval over documents; NaN for a single document), and
    share_losing, of the next tokens whose loss is the larger."""
    tokens: np.ndarray
    """(V,) mean difference of each token; NaN where it was not measured."""
    law: SaturatingFit | None
    """The excess law A (1 + n/n_0)^-p fitted to `tokens` over the training counts."""
    why_no_law: str
    """Empty where there is one."""


def compare(first: TokenAudit, second: TokenAudit) -> Comparison:
    """Paired differences of two audits of the same documents.

    Interval: documents are drawn anew, not tokens, which depend on each other. A bin's mean is the
    ratio of two sums over the documents, and its error that ratio's, to first order.

    Raises:
        ValueError: the two models have other tokens or were measured on another text.
    """
    a, b = first.losses, second.losses
    if a.num_classes != b.num_classes or not (
        a.starts.equal(b.starts) and a.target.equal(b.target)
    ):
        raise ValueError(
            "the two checkpoints read other tokens of the text; expected models of one tokenizer"
        )
    counts = first.tokens["training_count"].to_numpy()
    bins = FrequencyBins.powers(counts, base=3)
    difference = (a.loss.double() - b.loss.double()).numpy()
    target, starts = a.target.numpy(), a.starts.numpy()
    document = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    of_token = bins.index.numpy()[target]
    rows = []
    for place, label in [*enumerate(bins.labels), (-1, "never"), (None, "all")]:
        chosen = np.ones(len(target), bool) if place is None else of_token == place
        rows.append({"bin": label} | _paired(difference[chosen], document[chosen]))
    measured = first.tokens["count"].to_numpy()
    summed = np.bincount(target, weights=difference, minlength=len(counts))
    mean = np.divide(summed, measured, out=np.full(len(counts), np.nan), where=measured > 0)
    law, why = None, ""
    try:
        law = fit_excess_loss(np.where(measured > 0, counts, 0), np.nan_to_num(mean))
    except ValueError as error:
        why = str(error)
    return Comparison(bins=pd.DataFrame(rows), tokens=mean, law=law, why_no_law=why)


def _paired(difference: np.ndarray, document: np.ndarray) -> dict[str, float]:
    if not len(difference):
        nothing = dict.fromkeys(("difference", "low", "high", "share_losing"), np.nan)
        return {"measured": 0, **nothing}
    band = paired_band(difference, document)
    return {
        "measured": len(difference),
        "difference": band.mean,
        "low": band.mean - band.half_width,
        "high": band.mean + band.half_width,
        "share_losing": float((difference > 0).mean()),
    }


def over_training(steps: list[int], audits: list[TokenAudit]) -> pd.DataFrame:
    """Loss of each bin at each of S checkpoints, and how fast it was learned.

    Columns: bin, types, measured; a step each, the mean loss in nats over the bin's types; and
    learning_speed, S = 1 - AUC / T (section 4 of the paper) of each token, its mean over the types.

    Raises:
        ValueError: checkpoints of other tokens or measured on another text.
    """
    last = audits[-1].tokens
    if any(not audit.tokens["count"].equals(last["count"]) for audit in audits):
        raise ValueError("the checkpoints read other tokens; expected those of one training")
    frame = last[["training_count", "count"]].copy()
    losses = np.array([audit.tokens["loss"] for audit in audits])
    table = by_frequency(frame)
    for step, loss in zip(steps, losses, strict=True):
        table[step] = by_frequency(frame.assign(loss=loss))["loss"]
    speed = learning_speed(steps, losses)
    table["learning_speed"] = by_frequency(frame.assign(loss=speed))["loss"]
    return table
