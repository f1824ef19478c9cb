"""What models are asked: reviews as ids, the words in them, how often training had both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, Tokenizer

from frequency_bins import class_counts
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.text.tokenization import SPECIAL_TOKENS

_AT_A_TIME = 1000  # texts whose encodings, which hold more than ids, are kept at once
Word = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Review:
    """A review's first tokens (T,), and where its words of several tokens begin and end in it."""

    ids: np.ndarray
    words: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """How often training had each token (V,) as the next one, and each word of several tokens."""

    tokens: np.ndarray
    words: Counter[Word]


def encode(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> Iterator[Review]:
    """Each text cut at the context; a word that the cut may have shortened is no word of it."""
    for start in range(0, len(texts), _AT_A_TIME):
        for encoding in tokenizer.encode_batch(list(texts[start : start + _AT_A_TIME])):
            ids = np.array(encoding.ids[:context], dtype=np.int64)
            yield Review(ids=ids, words=tuple(_words(encoding, len(ids))))


def _words(encoding: Encoding, length: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the words of two tokens and more that lie before `length` as a whole."""
    numbers = encoding.word_ids
    begin = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[begin]:
            if numbers[begin] is not None and place - begin > 1 and place <= length:
                yield begin, place
            begin = place
        if begin >= length:
            return


def counts_of_corpus(corpus: PreparedCorpus) -> Counts:
    """Of what a run was trained on; where a sequence cuts a word, of what is left of it."""
    tokenizer = corpus.tokenizer()
    parts: list[list[int]] = []
    for row in corpus.tokens:
        cuts = np.flatnonzero(row < len(SPECIAL_TOKENS))
        parts += [part[part >= len(SPECIAL_TOKENS)].tolist() for part in np.split(row, cuts)]
    texts = tokenizer.decode_batch([part for part in parts if part])
    longest = corpus.tokens.shape[1] + 1
    words = _counted(encode(tokenizer, texts, longest))
    return Counts(tokens=corpus.class_counts.numpy(), words=words)


def counts_of_texts(
    tokenizer: Tokenizer, texts: Sequence[str], context: int, vocab_size: int
) -> Counts:
    """Of texts that stand for what a model was trained on."""
    sequences = list(encode(tokenizer, texts, context))
    targets = np.concatenate([sequence.ids[1:] for sequence in sequences])
    tokens = class_counts(targets, vocab_size).numpy()
    return Counts(tokens=tokens, words=_counted(sequences))


def _counted(sequences: Iterator[Review] | list[Review]) -> Counter[Word]:
    return Counter(
        tuple(sequence.ids[begin:end].tolist())
        for sequence in sequences
        for begin, end in sequence.words
    )
