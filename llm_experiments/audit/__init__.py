"""Loss and accuracy by token frequency of a model that exists: the practitioner's check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from llm_experiments.audit.checkpoints import check_against_file, load, load_tokenizer
from llm_experiments.audit.comparing import Comparison, compare, over_training
from llm_experiments.audit.measuring import (
    TokenLosses,
    beginning,
    measure,
    next_token_counts,
    tokenize,
)
from llm_experiments.audit.result import TokenAudit, summarise
from llm_experiments.audit.words import text_losses, word_counts
from llm_experiments.models.causality import evaluating, is_causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Comparison",
    "TokenAudit",
    "TokenLosses",
    "audit",
    "compare",
    "load",
    "load_tokenizer",
    "measure",
    "next_token_counts",
    "over_training",
    "tokenize",
]


def audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    context: int = 128,
    stride: int | None = None,
    training_counts: Tensor | None = None,
    training_documents: Sequence[str] | None = None,
    batch_size: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> TokenAudit:
    """Measure a causal language model on documents, by how often its V tokens were trained on.

    Args:
        model: on its device and in its type; softmax and losses are float32. Its mode is kept.
        tokenizer: that of the model, with its special tokens.
        documents: D texts. Each is cut at ``context`` tokens or, with a ``stride``, read as a whole
            in windows of so many tokens (see `measure`). One of a single token is left out.
        training_counts: (V,) int64, how often each token was the next one in the training text.
        training_documents: or that text, counted at the same cut; by default ``documents``.
        batch_size: windows at a time; by default as many as suit the device.

    Returns:
        `TokenAudit`: a data frame of V tokens (losses in nats), the N losses, words, bits a byte.

    Raises:
        ValueError: a model that sees the tokens it is asked for; a tokenizer whose class reads text
            otherwise than its tokenizer.json; settings out of range; what `measure` raises.
    """
    if context < 2 or (batch_size is not None and batch_size < 1):
        name, value, least = (
            ("context", context, 2) if context < 2 else ("batch_size", batch_size, 1)
        )
        raise ValueError(f"{name} is {value}; expected at least {least}")
    if not is_causal(model):
        raise ValueError(
            f"{type(model).__name__} sees the tokens after the one it is asked for; expected a "
            "causal language model"
        )
    check_against_file(tokenizer, documents)
    cut = None if stride else context
    sequences = tokenize(tokenizer, documents, cut)
    with evaluating(model):
        losses = measure(
            model,
            sequences,
            context=context,
            stride=stride,
            prefix=beginning(tokenizer),
            batch_size=batch_size,
            report=report,
        )
    if training_counts is None:
        counted = sequences
        if training_documents is not None:
            counted = tokenize(tokenizer, training_documents, cut)
        training_counts = next_token_counts(counted, losses.num_classes)
    elif training_counts.shape != (losses.num_classes,):
        raise ValueError(
            f"training_counts have the shape {tuple(training_counts.shape)}; expected "
            f"({losses.num_classes},), one for each row of the embedding"
        )
    text = text_losses(tokenizer, documents, losses, cut)
    words = word_counts(documents if training_documents is None else training_documents)
    return summarise(model, tokenizer, losses, training_counts, text, words)
