"""The token metrics of the paper's Algorithm 1, against which ours are measured."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def fill_dictionary(metrics: dict[int, dict[str, float]], logits: Tensor, labels: Tensor) -> None:
    """To the letter, of logits (B, T, V) and labels (B, T): a cross-entropy for each token."""
    predictions = logits.argmax(-1)
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1]):
            token = labels[row, place]
            loss = F.cross_entropy(logits[row, place], token)
            entry = metrics.setdefault(int(token), {"loss": 0.0, "correct": 0, "count": 0})
            entry["loss"] += loss.item()
            entry["correct"] += int(predictions[row, place] == token)
            entry["count"] += 1
