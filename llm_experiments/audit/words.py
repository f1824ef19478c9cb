"""What tokens make of the text: the bytes that were measured, and the losses of whole words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llm_experiments.audit.measuring import TokenLosses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class TextLosses:
    """The same losses by the text's own units, whatever the tokenizer."""

    bits_per_byte: float
    """All losses in bits, over the UTF-8 bytes that the tokens stand for."""
    words: dict[str, tuple[int, float]]
    """How often each word was measured, and its summed loss in nats."""


def text_losses(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    losses: TokenLosses,
    context: int | None,
) -> TextLosses | None:
    """Bits a byte, and the loss of every word: the sum of its tokens' losses.

    A word is what stands between white space, and a token belongs to the word that it ends in. A
    word counts where all of its tokens were measured. ``documents`` are those of ``losses``, cut at
    the same ``context``. None for a tokenizer that does not tell where its tokens stand.
    """
    if not tokenizer.is_fast:
        return None
    cut = {} if context is None else {"truncation": True, "max_length": context}
    starts, nats = losses.starts.tolist(), losses.loss.double().numpy()
    num_bytes, place = 0, 0
    words: dict[str, tuple[int, float]] = {}
    for text in documents:
        spans = np.array(tokenizer(text, return_offsets_mapping=True, **cut)["offset_mapping"])
        if len(spans) < 2:
            continue
        loss = nats[starts[place] : starts[place + 1]]
        place += 1
        real = spans[:, 1] > spans[:, 0]
        begin = int(spans[0, 1]) if real[0] else 0
        end = int(spans[real, 1].max(initial=begin))
        num_bytes += len(text[begin:end].encode("utf-8", "surrogatepass"))
        _add_words(words, text, begin, end, spans[1:][real[1:]], loss[real[1:]])
    bits = float(nats.sum()) / math.log(2)
    return TextLosses(bits_per_byte=bits / num_bytes if num_bytes else math.nan, words=words)


def _add_words(
    words: dict[str, tuple[int, float]],
    text: str,
    begin: int,
    end: int,
    spans: np.ndarray,
    loss: np.ndarray,
) -> None:
    found = [match for match in _WORD.finditer(text) if match.end() <= end]
    if not found:
        return
    first = np.array([match.start() for match in found])
    last = np.array([match.end() for match in found])
    word = np.searchsorted(first, spans[:, 1] - 1, side="right") - 1
    inside = (word >= 0) & (spans[:, 1] <= last[word])
    sums = np.bincount(word[inside], weights=loss[inside], minlength=len(found))
    hits = np.bincount(word[inside], minlength=len(found))
    for match, summed, hit in zip(found, sums.tolist(), hits.tolist(), strict=True):
        if hit and match.start() >= begin:
            count, total = words.get(match[0], (0, 0.0))
            words[match[0]] = (count + 1, total + summed)


def word_counts(documents: Iterable[str]) -> Counter[str]:
    """How often each word occurs."""
    return Counter(word for text in documents for word in text.split())
