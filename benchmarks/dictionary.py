"""Token metrics as the paper's Algorithm 1 writes them: what ours are measured against."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def fill_dictionary(metrics: dict[int, dict[str, float]], logits: Tensor, labels: Tensor) -> None:
    """Algorithm 1 to the letter: a loop over tokens, a cross-entropy a token.

    Of logits (B, T, V) and labels (B, T); ``metrics`` gets the loss, correct and count of a token.
    """
    predictions = logits.argmax(-1)
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1]):
            token = labels[row, place]
            loss = F.cross_entropy(logits[row, place], token)
            entry = metrics.setdefault(int(token), {"loss": 0.0, "correct": 0, "count": 0})
            entry["loss"] += loss.item()
            entry["correct"] += int(predictions[row, place] == token)
            entry["count"] += 1
