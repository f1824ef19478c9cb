"""The loss of every next token: documents cut into windows, in batches of about one length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

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
    predicted: Int64[Tensor, " V"]
    """How often each token is the prediction, right or wrong."""
    starts: Int64[Tensor, " D_and_1"]
    """Document d holds the next tokens starts[d] to starts[d + 1]."""

    @cached_property
    def metrics(self) -> ClassMetrics:
        """Counts, summed losses and hits of each of the V classes."""
        metrics = ClassMetrics(self.num_classes)
        metrics.update(self.loss, self.target, self.correct)
        return metrics


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], context: int | None
) -> list[Tensor]:
    """Ids of each document cut at the context, with the special tokens that the tokenizer adds.

    Documents of a single token are left out. None: whole documents.
    """
    cut = {} if context is None else {"truncation": True, "max_length": context}
    sequences = []
    for start in range(0, len(documents), _DOCUMENTS_AT_A_TIME):
        part = list(documents[start : start + _DOCUMENTS_AT_A_TIME])
        encoded = tokenizer(part, **cut)["input_ids"]
        sequences += [torch.tensor(ids) for ids in encoded if len(ids) > 1]
    return sequences


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before every text; none for many."""
    ids = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    added = next((n for n in range(len(ids)) if ids[n : n + len(bare)] == bare), 0)
    return list(ids[:added])


def next_token_counts(sequences: Sequence[Tensor], num_classes: int) -> Tensor:
    """(V,) int64: how often each token is the next token; ValueError for one beyond the V."""
    targets = torch.cat([sequence[1:] for sequence in sequences])
    _check_ids(targets, num_classes)
    return class_counts(targets, num_classes)


class _Window(NamedTuple):
    """A part of a sequence with what stands before it; tokens from `first` on count."""

    ids: Tensor
    first: int
    place: int
    """Of the first loss among all."""


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    *,
    context: int | None = None,
    stride: int | None = None,
    prefix: Sequence[int] = (),
    batch_size: int | None = None,
    max_logits: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> TokenLosses:
    """Loss (nats), hit and prediction of every next token of the sequences.

    With a stride, a sequence longer than the context is read in windows of so many tokens, each
    ``stride`` further than the one before. Every token counts once, in the first window that
    reaches it, with at least ``context - stride`` tokens before it. Windows after the first begin
    with ``prefix``, as the sequence itself does (see `beginning`).

    A batch holds ``batch_size`` windows of about one length or, by default, as many as give
    ``max_logits`` logits (what suits the device), and at least one; where the device has no memory
    for them, half as many. ``report`` is told after each batch how many windows are done.

    Raises:
        ValueError: a sequence longer than the model's positions, or none; a context or stride that
            leaves no token to predict from; an id that the model has no embedding for; a loss that
            is not finite.
    """
    num_classes = model.get_input_embeddings().num_embeddings
    starts = torch.tensor([0, *(len(sequence) - 1 for sequence in sequences)]).cumsum(0)
    windows = _windows(sequences, starts.tolist(), context, stride, prefix)
    longest = max((len(window.ids) for window in windows), default=0)
    positions = getattr(model.config, "max_position_embeddings", None) or longest
    if not 1 < longest <= positions:
        raise ValueError(
            f"the longest sequence has {longest} tokens; expected at least 2 and, for the "
            f"positions of this model, at most {positions}"
        )
    _check_ids(torch.cat(list(sequences)), num_classes)
    target = torch.cat([sequence[1:] for sequence in sequences])
    losses = TokenLosses(
        num_classes=num_classes,
        target=target,
        loss=torch.empty(len(target)),
        correct=torch.empty(len(target), dtype=torch.bool),
        predicted=torch.zeros(num_classes, dtype=torch.int64),
        starts=starts,
    )
    most = max_logits or _MOST_LOGITS.get(model.device.type, 2**24)
    done = 0
    for batch in _batches(windows, most // num_classes, batch_size):
        _measure_batch(model, batch, losses)
        report(done := done + len(batch))
    return losses


def _measure_batch(model: PreTrainedModel, windows: Sequence[_Window], losses: TokenLosses) -> None:
    """Write what a batch gives where it belongs; in halves, if the device has no room for it."""
    try:
        found = _predict(model, windows)
    except torch.OutOfMemoryError:
        if len(windows) == 1:
            raise
        for half in (windows[: len(windows) // 2], windows[len(windows) // 2 :]):
            _measure_batch(model, half, losses)
        return
    for window, loss, correct, predicted in zip(windows, *found, strict=True):
        part = slice(window.place, window.place + len(loss))
        losses.loss[part], losses.correct[part] = loss, correct
        losses.predicted.index_add_(0, predicted, torch.ones_like(predicted))
        _check_finite(loss, losses.target[part])


def _predict(
    model: PreTrainedModel, windows: Sequence[_Window]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each window: the losses that count, the hits and the predictions, on the CPU."""
    rows = [window.ids for window in windows]
    ids = pad_sequence(rows, batch_first=True, padding_value=0)
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
    mask = (labels != IGNORE_INDEX).long()
    before = min(window.first for window in windows) - 1  # logits of which none counts
    more = {}
    if before and "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = ids.shape[1] - before
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=False,
        **more,
    ).logits
    logits, labels = logits[:, -(ids.shape[1] - before) :], labels[:, before:]
    seen = next_token_predictions(logits, labels, half=model.dtype.itemsize < 4)
    largest = logits[:, :-1].argmax(dim=-1)
    columns = (seen.loss, seen.correct, largest)
    tables = [column.cpu().view(len(rows), -1) for column in columns]
    parts = [slice(w.first - 1 - before, len(w.ids) - 1 - before) for w in windows]
    loss, correct, predicted = (
        [row[part] for row, part in zip(table, parts, strict=True)] for table in tables
    )
    return loss, correct, predicted


def _windows(
    sequences: Sequence[Tensor],
    starts: Sequence[int],
    context: int | None,
    stride: int | None,
    prefix: Sequence[int],
) -> list[_Window]:
    if stride is None:
        return [_Window(ids, 1, place) for ids, place in zip(sequences, starts, strict=False)]
    most = 0 if context is None else context - max(1, len(prefix))
    if context is None or not 1 <= stride <= most:
        raise ValueError(f"stride is {stride}; expected 1 to {most} of the context of {context}")
    before = torch.tensor(prefix, dtype=torch.int64)
    windows = []
    for ids, place in zip(sequences, starts, strict=False):
        windows.append(_Window(ids[:context], 1, place))
        for done in range(context, len(ids), stride):
            begin = done + stride - (context - len(prefix))
            part = torch.cat((before, ids[begin : done + stride]))
            windows.append(_Window(part, len(prefix) + done - begin, place + done - 1))
    return windows


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


def _batches(
    windows: Sequence[_Window], max_tokens: int, batch_size: int | None
) -> Iterator[list[_Window]]:
    """Windows of about one length, long ones first, of ``max_tokens`` when padded."""
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        most = batch_size or max_tokens // len((batch or [window])[0].ids)
        if batch and len(batch) + 1 > most:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
