"""What an audit found, token by token and by frequency, and the file that keeps it."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from frequency_bins import FrequencyBins, average_loss, token_balanced_loss
from llm_experiments.audit.measuring import TokenLosses
from llm_experiments.audit.words import TextLosses
from run_store import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MEANS = ("loss", "accuracy", "embedding_norm", "head_norm", "hardly_reachable")
"""Columns of a token that `by_frequency` averages over the types of a bin."""
_HARDLY = 1000  # one row of so many, the shortest, is hardly reached


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenAudit:
    """A model measured on a text."""

    tokens: pd.DataFrame
    """A row a token, V in all: id; token, the vocabulary's name, unlike any other; text, as it
    reads; training_count; count, how often it was measured; loss in nats and accuracy, means, NaN
    where it was not; predicted, how often it was the prediction; embedding_norm and head_norm, the
    lengths of its rows; hardly_reachable: never the prediction, its row in the head among the
    shortest per mille."""
    losses: TokenLosses
    """Every next token by itself."""
    text: TextLosses | None
    """None for a tokenizer that does not tell where its tokens stand in the text."""
    words: pd.DataFrame | None
    """A row a word: word, training_count, count, loss (the sum over its tokens, in nats)."""

    @cached_property
    def average_loss(self) -> float:
        """Mean over the next tokens, in nats."""
        return float(average_loss(self.tokens["count"].to_numpy(), self.tokens["loss"].to_numpy()))

    @cached_property
    def token_balanced_loss(self) -> float:
        """Mean over the tokens that were measured, in nats, each once."""
        counts, losses = self.tokens["count"].to_numpy(), self.tokens["loss"].to_numpy()
        return float(token_balanced_loss(counts, losses))

    def by_frequency(self) -> pd.DataFrame:
        """A row a bin of training counts; see `by_frequency`."""
        return by_frequency(self.tokens)

    def save(self, path: Path, tables: list[TextTable] | None = None, name: str = "") -> None:
        """Write `tokens` as .csv or .parquet; the latter also keeps tables, for the page."""
        write_tokens(path, self.tokens, tables or [], name)


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table of text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def summarise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    losses: TokenLosses,
    training_counts: Tensor,
    text: TextLosses | None,
    word_counts: dict[str, int],
) -> TokenAudit:
    """Losses beside counts (V,), names and the model's own rows."""
    metrics = losses.metrics
    names = token_names(tokenizer, metrics.num_classes)
    known = len(tokenizer)
    head = model.get_output_embeddings()
    embedding_norm = row_norms(model.get_input_embeddings().weight)
    head_norm = embedding_norm if head is None else row_norms(head.weight)[: len(embedding_norm)]
    shortest = max(1, math.ceil(len(head_norm) / _HARDLY))
    short = head_norm <= np.partition(head_norm, shortest - 1)[shortest - 1]
    tokens = pd.DataFrame(
        {
            "id": np.arange(len(names)),
            "token": names,
            "text": [tokenizer.decode([i]) if i < known else "" for i in range(len(names))],
            "training_count": training_counts.numpy(),
            "count": metrics.count.numpy(),
            "loss": metrics.loss.numpy(),
            "accuracy": metrics.accuracy.numpy(),
            "predicted": losses.predicted.numpy(),
            "embedding_norm": embedding_norm,
            "head_norm": head_norm,
            "hardly_reachable": (losses.predicted.numpy() == 0) & short,
        }
    )
    words = None
    if text is not None:
        rows = [(w, word_counts.get(w, 0), n, total / n) for w, (n, total) in text.words.items()]
        words = pd.DataFrame(rows, columns=["word", "training_count", "count", "loss"])
    return TokenAudit(tokens=tokens, losses=losses, text=text, words=words)


def by_frequency(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a bin of training counts (powers of 3, then those that never occur).

    Columns: bin; types; measured, next tokens; and the mean over the types of each of `MEANS` that
    the rows have, of loss and accuracy over the types that were measured.
    """
    bins = FrequencyBins.powers(rows["training_count"].to_numpy(), base=3)
    index = bins.index.numpy()
    found = []
    for place, label in [*enumerate(bins.labels), (-1, "never")]:
        part = rows[index == place]
        row: dict[str, Any] = {"bin": label, "types": len(part), "measured": part["count"].sum()}
        # NaN, where a token was not measured, does not enter.
        found.append(row | {name: part[name].mean() for name in MEANS if name in part})
    return pd.DataFrame(found)


@torch.no_grad()
def row_norms(weight: Tensor) -> np.ndarray:
    """(V,) Euclidean lengths of the rows of a (V, D) matrix, in float32 or wider."""
    parts = [part.float().norm(dim=1).cpu() for part in weight.split(2**14)]
    return torch.cat(parts).double().numpy()


def write_tokens(path: Path, tokens: pd.DataFrame, tables: list[TextTable], name: str) -> None:
    """A row a token; .parquet also keeps the name and tables of text for `reports build`."""
    if path.suffix == ".parquet":
        buffer = io.BytesIO()
        kept = tokens.copy(deep=False)
        kept.attrs = {"audit": name, "tables": [vars(table) for table in tables]}
        kept.to_parquet(buffer, index=False)
        write_atomically(path, buffer.getvalue())
    else:
        # With this end of line every token that holds one of its two characters is quoted.
        text = tokens.to_csv(index=False, lineterminator="\r\n")
        write_atomically(path, text.encode("utf-8", "backslashreplace"))


def token_names(tokenizer: PreTrainedTokenizerBase, num_classes: int) -> list[str]:
    """What the vocabulary calls each of V ids, no two alike; "id 7" for one that it lacks."""
    vocabulary = {token_id: name for name, token_id in tokenizer.get_vocab().items()}
    names: list[str] = []
    known: set[str] = set()
    for token_id in range(num_classes):
        name = vocabulary.get(token_id, f"id {token_id}")
        while name in known:
            name += f" (id {token_id})"
        names.append(name)
        known.add(name)
    return names
