"""How uneven a prepared corpus is, at its vocabulary and at smaller ones (Figures 3 and 8)."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from frequency_bins import rare_share
from llm_experiments.text.preparation import PreparedCorpus
from llm_experiments.text.tokenization import PAD_ID, SMALLEST_VOCABULARY

_ROWS_AT_A_TIME = 4096
Counts = npt.NDArray[np.int64]


def rare_shares(corpus: PreparedCorpus, sizes: Sequence[int] | None = None) -> dict[int, float]:
    """Figure 3b: `frequency_bins.rare_share` of the next tokens for several vocabulary sizes.

    By default the sizes are the corpus's own and its halves, as far as there are any.

    Raises:
        ValueError: a size larger than the corpus's, or too small for bytes and special tokens.
    """
    if sizes is None:
        halves = [corpus.vocab_size >> power for power in reversed(range(6))]
        sizes = [size for size in halves if size >= SMALLEST_VOCABULARY]
    for size in sizes:
        if not SMALLEST_VOCABULARY <= size <= corpus.vocab_size:
            raise ValueError(
                f"a vocabulary of {size} cannot be told from one of {corpus.vocab_size}; expected "
                f"{SMALLEST_VOCABULARY} to {corpus.vocab_size}"
            )
    return {size: rare_share(counts_at(corpus, size)) for size in sizes}


def counts_at(corpus: PreparedCorpus, vocab_size: int) -> Counts:
    """(vocab_size,) next-token counts, had the tokenizer been trained to fewer entries.

    Byte-pair encoding merges in the order in which it learned the pairs, and a smaller vocabulary
    knows the first ones only. So its tokens are those of the large one taken apart again, each
    document cut at the context anew. (Packed documents are not cut, so they keep all their text. A
    token that several pairs make is taken apart into the first of them.)
    """
    sizes, starts, pieces = _taken_apart(corpus, vocab_size)
    context = np.inf if corpus.packed else corpus.tokens.shape[1]
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, len(corpus.tokens), _ROWS_AT_A_TIME):
        rows = np.asarray(corpus.tokens[first : first + _ROWS_AT_A_TIME])
        row, column = np.nonzero(rows != PAD_ID)
        ids = rows[row, column]
        lengths = sizes[ids]
        # Where the parts of each token begin: among all parts, and among those of its row.
        begins = np.cumsum(lengths) - lengths
        row_begins = begins[np.searchsorted(row, row)]
        within = np.arange(lengths.sum()) - np.repeat(begins, lengths)
        place = np.repeat(begins - row_begins, lengths) + within
        parts = pieces[np.repeat(starts[ids], lengths) + within]
        counts += np.bincount(parts[(place > 0) & (place < context)], minlength=vocab_size)
    return counts


def _taken_apart(corpus: PreparedCorpus, vocab_size: int) -> tuple[Counts, Counts, Counts]:
    """Of every token, how many tokens of the smaller vocabulary it is, and where they stand.

    Returns lengths (V,), starts (V,) and the parts of all tokens in a row.
    """
    model = json.loads(corpus.tokenizer().to_str())["model"]
    ids: dict[str, int] = model["vocab"]
    pairs: dict[int, tuple[int, int]] = {}
    for left, right in model["merges"]:
        pairs.setdefault(ids[left + right], (ids[left], ids[right]))
    parts: list[list[int]] = []
    for token in range(corpus.vocab_size):
        if token < vocab_size:
            parts.append([token])
        else:
            left, right = pairs[token]
            parts.append(parts[left] + parts[right])
    lengths = np.array([len(part) for part in parts])
    return lengths, np.cumsum(lengths) - lengths, np.concatenate([np.array(p) for p in parts])
