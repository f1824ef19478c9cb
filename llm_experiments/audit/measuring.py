"""The loss of every next token: documents cut into windows, in batches of about one length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from frequency_bins import ClassMetrics, class_counts
from llm_experiments.models.logits import next_token_predictions
from llm_experiments.models.loss_head import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DOCUMENTS_AT_A_TIME = 1000
# Of a batch: on a CPU more of them take memory and save no time; a GPU wants larger products.
_MOST_LOGITS = {"cpu": 2**24, "cuda": 2**26}


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenLosses:
    """N next tokens of D documents, in the order of the text."""

    num_classes: int
    """V, the rows of the model's embedding."""
    target: Int64[Tensor, " N"]
    loss: Float[Tensor, " N"]
    """Cross-entropy in nats, float32."""
    correct: Bool[Tensor, " N"]

    @cached_property
    def metrics(self) -> ClassMetrics:
        """Counts, summed losses and hits of each of the V classes."""
        metrics = ClassMetrics(self.num_classes)
        metrics.update(self.loss, self.target, self.correct)
        return metrics


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], context: int
) -> list[Tensor]:
    """Ids of each document cut at the context, with the special tokens that the tokenizer adds.

    Documents of a single token are left out.
    """
    sequences = []
    for start in range(0, len(documents), _DOCUMENTS_AT_A_TIME):
        part = list(documents[start : start + _DOCUMENTS_AT_A_TIME])
        encoded = tokenizer(part, truncation=True, max_length=context)["input_ids"]
        sequences += [torch.tensor(ids) for ids in encoded if len(ids) > 1]
    return sequences


def next_token_counts(sequences: Sequence[Tensor], num_classes: int) -> Tensor:
    """(V,) int64: how often each token is the next token; ValueError for one beyond the V."""
    targets = torch.cat([sequence[1:] for sequence in sequences])
    _check_ids(targets, num_classes)
    return class_counts(targets, num_classes)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    *,
    max_logits: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> TokenLosses:
    """Loss (nats) and hit of every next token of the sequences.

    A batch holds as many sequences of about one length as give ``max_logits`` logits (default: what
    suits the device), and at least one. ``report`` is told after each batch how many sequences are
    done.

    Raises:
        ValueError: a sequence longer than the model's positions, or none; an id that the model has
            no embedding for; a loss that is not finite.
    """
    num_classes = model.get_input_embeddings().num_embeddings
    longest = max(map(len, sequences), default=0)
    positions = getattr(model.config, "max_position_embeddings", longest)
    if not 1 < longest <= positions:
        raise ValueError(
            f"the longest sequence has {longest} tokens; expected at least 2 and, for the "
            f"positions of this model, at most {positions}"
        )
    _check_ids(torch.cat(list(sequences)), num_classes)
    target = torch.cat([sequence[1:] for sequence in sequences])
    starts = torch.tensor([0, *(len(sequence) - 1 for sequence in sequences)]).cumsum(0).tolist()
    losses = TokenLosses(
        num_classes=num_classes,
        target=target,
        loss=torch.empty(len(target)),
        correct=torch.empty(len(target), dtype=torch.bool),
    )
    done = 0
    most = max_logits or _MOST_LOGITS.get(model.device.type, 2**24)
    for places in _batches(sequences, most // num_classes):
        rows = [sequences[place] for place in places]
        ids = pad_sequence(rows, batch_first=True, padding_value=0)
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
        mask = (labels != IGNORE_INDEX).long()
        logits = model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).logits
        seen = next_token_predictions(logits, labels, half=model.dtype.itemsize < 4)
        loss, correct = (part.cpu().view(len(rows), -1) for part in (seen.loss, seen.correct))
        for place, row, row_loss, row_correct in zip(places, rows, loss, correct, strict=True):
            part = slice(starts[place], starts[place + 1])
            losses.loss[part] = row_loss[: len(row) - 1]
            losses.correct[part] = row_correct[: len(row) - 1]
            _check_finite(losses.loss[part], row[1:])
        report(done := done + len(rows))
    return losses


def _check_ids(ids: Tensor, num_classes: int) -> None:
    if (largest := int(ids.max())) >= num_classes:
        raise ValueError(
            f"the text has a token of id {largest}, the model {num_classes} embeddings; expected "
            "the tokenizer of this model"
        )


def _check_finite(loss: Tensor, target: Tensor) -> None:
    wrong = ~loss.isfinite()
    if bool(wrong.any()):
        raise ValueError(
            f"the loss of a token of id {int(target[wrong][0])} is {float(loss[wrong][0])}; "
            "expected a number (do the weights hold NaN, or are they too large for their type?)"
        )


def _batches(sequences: Sequence[Tensor], max_tokens: int) -> Iterator[list[int]]:
    """Places of sequences of about one length, long ones first, of ``max_tokens`` when padded."""
    batch: list[int] = []
    for place in sorted(range(len(sequences)), key=lambda place: -len(sequences[place])):
        if batch and (len(batch) + 1) * len(sequences[batch[0]]) > max_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
