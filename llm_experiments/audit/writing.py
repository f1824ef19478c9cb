"""What an audit found, token by token, as a file."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from torch import Tensor

from frequency_bins import ClassMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def to_csv(tokenizer: PreTrainedTokenizerBase, counts: Tensor, metrics: ClassMetrics) -> bytes:
    """A line a token: id, name, text, training count, measured count, loss, accuracy.

    The name is the vocabulary's own and tells the token from every other; the text is how it reads.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("id", "token", "text", "training_count", "count", "loss", "accuracy"))
    columns = (counts, metrics.count, metrics.loss, metrics.accuracy)
    names = token_names(tokenizer, metrics.num_classes)
    for token_id, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        reads = tokenizer.decode([token_id]) if token_id < len(tokenizer) else ""
        writer.writerow((token_id, names[token_id], reads, *row))
    return text.getvalue().encode("utf-8", "backslashreplace")


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
