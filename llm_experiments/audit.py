"""Loss and accuracy by token frequency of a model that exists: the practitioner's check."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from frequency_bins import ClassMetrics, class_counts
from llm_experiments.loss_head import IGNORE_INDEX
from llm_experiments.model_folder import check_model_folder, no_larger_than
from llm_experiments.models import openelm  # noqa: F401  (registers OpenELM with transformers)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a local folder in transformers' format.

    Only safetensors are read, and no code of the folder is run; see `check_model_folder`.

    Raises:
        ValueError: not such a folder, or a tokenizer with more tokens than the model has.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = check_model_folder(folder)
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with no_larger_than(weights):
            tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
            model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **settings)
        # Settings can be wrong in what only their use shows.
        tokenizer(["a b"], truncation=True, max_length=2)
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64))
    except BaseException as error:  # of many kinds, and Rust's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{str(folder)!r} could not be loaded: {reason}") from None
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise ValueError(
            f"{str(folder)!r}: the tokenizer has {len(tokenizer)} tokens, the model {size}; "
            "expected a tokenizer of this model"
        )
    return model.eval(), tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], context: int
) -> list[Tensor]:
    """Ids of each document cut at the context; documents of a single token are left out."""
    encoded = tokenizer(list(documents), truncation=True, max_length=context)["input_ids"]
    return [torch.tensor(ids) for ids in encoded if len(ids) > 1]


def next_token_counts(sequences: Sequence[Tensor], num_classes: int) -> Tensor:
    """(V,) int64: how often each token is the next token."""
    targets = torch.cat([sequence[1:] for sequence in sequences])
    return class_counts(targets, num_classes)


@torch.no_grad()
def audit(
    model: PreTrainedModel, sequences: Sequence[Tensor], batch_size: int = 16
) -> ClassMetrics:
    """Loss (nats) and accuracy of every next token of the sequences."""
    metrics = ClassMetrics(model.get_input_embeddings().num_embeddings, model.device)
    for ids, targets in _batches(sequences, batch_size):
        mask = torch.arange(ids.shape[1]) < (targets != IGNORE_INDEX).sum(1, keepdim=True) + 1
        logits = model(
            input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device)
        ).logits[:, :-1]
        targets = targets.to(model.device)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
        )
        metrics.update(losses, targets.flatten(), logits.argmax(-1).flatten() == targets.flatten())
    return metrics


def to_csv(tokenizer: PreTrainedTokenizerBase, counts: Tensor, metrics: ClassMetrics) -> bytes:
    """A line a token: id, text, training count, measured count, loss, accuracy."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("id", "token", "training_count", "count", "loss", "accuracy"))
    columns = (counts, metrics.count, metrics.loss, metrics.accuracy)
    for token_id, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        writer.writerow((token_id, tokenizer.decode([token_id]), *row))
    return text.getvalue().encode("utf-8", "backslashreplace")


def _batches(sequences: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids (B, T) padded on the right and targets (B, T - 1), long sequences together."""
    order = np.argsort([-len(sequence) for sequence in sequences], kind="stable")
    for start in range(0, len(order), size):
        rows = [sequences[row] for row in order[start : start + size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        targets = torch.nn.utils.rnn.pad_sequence(
            [row[1:] for row in rows], batch_first=True, padding_value=IGNORE_INDEX
        )
        yield ids, targets
