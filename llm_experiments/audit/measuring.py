"""Loss and accuracy by token frequency of a model that exists: the practitioner's check."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from frequency_bins import ClassMetrics, class_counts
from llm_experiments.models import openelm  # noqa: F401  (registers OpenELM with transformers)
from llm_experiments.models.logits import next_token_predictions
from llm_experiments.models.loss_head import IGNORE_INDEX
from llm_experiments.models.model_folder import check_model_folder, no_larger_than

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DOCUMENTS_AT_A_TIME = 1000
_TOKENIZERS = ("tokenizer.json", "vocab", ".model", ".spm")  # in the names of its files
# Of a batch: on a CPU more of them take memory and save no time; a GPU wants larger products.
_MOST_LOGITS = {"cpu": 2**24, "cuda": 2**26}


def load(
    folder: Path, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a local folder in transformers' format.

    The model has the number type of its checkpoint. Only safetensors are read, and no code of the
    folder is run; see `check_model_folder`.

    Raises:
        ValueError: not such a folder, weights that are missing or of another shape (transformers
            would draw them at random), or a tokenizer with more tokens than the model has.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = check_model_folder(folder)
    if not any(file in path.name for path in folder.iterdir() for file in _TOKENIZERS):
        raise ValueError(f"{str(folder)!r} holds no tokenizer; expected tokenizer.json or its like")
    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with no_larger_than(weights):
            tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **settings
            )
        # Settings can be wrong in what only their use shows.
        tokenizer(["a b"], truncation=True, max_length=2)
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64))
    except BaseException as error:  # of many kinds, and Rust's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{str(folder)!r} could not be loaded: {reason}") from None
    if lacking := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        raise ValueError(
            f"{str(folder)!r} has no weights for {len(lacking)} parameters of the model, such as "
            f"{min(map(str, lacking))}; expected a whole checkpoint"
        )
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise ValueError(
            f"{str(folder)!r}: the tokenizer has {len(tokenizer)} tokens, the model {size}; "
            "expected a tokenizer of this model"
        )
    return model.eval().to(device), tokenizer


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
    """(V,) int64: how often each token is the next token."""
    targets = torch.cat([sequence[1:] for sequence in sequences])
    return class_counts(targets, num_classes)


@torch.no_grad()
def audit(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    *,
    max_logits: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> ClassMetrics:
    """Loss (nats) and accuracy of every next token of the sequences.

    A batch holds as many sequences of about one length as give ``max_logits`` logits (default: what
    suits the device), and at least one. ``report`` is told after each batch how many sequences are
    done.

    Raises:
        ValueError: a sequence longer than the model's positions, or none.
    """
    num_classes = model.get_input_embeddings().num_embeddings
    longest = max(map(len, sequences), default=0)
    positions = getattr(model.config, "max_position_embeddings", longest)
    if not 1 < longest <= positions:
        raise ValueError(
            f"the longest sequence has {longest} tokens; expected at least 2 and, for the "
            f"positions of this model, at most {positions}"
        )
    metrics = ClassMetrics(num_classes, model.device)
    done = 0
    most = max_logits or _MOST_LOGITS.get(model.device.type, 2**24)
    for rows in _batches(sequences, most // num_classes):
        ids = pad_sequence(rows, batch_first=True, padding_value=0)
        labels = pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
        mask = (labels != IGNORE_INDEX).long()
        logits = model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).logits
        metrics.update(*next_token_predictions(logits, labels, half=model.dtype.itemsize < 4))
        report(done := done + len(rows))
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


def _batches(sequences: Sequence[Tensor], max_tokens: int) -> Iterator[list[Tensor]]:
    """Sequences of about one length, long ones first, padded to at most ``max_tokens`` tokens."""
    batch: list[Tensor] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > max_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
