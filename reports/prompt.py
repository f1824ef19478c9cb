"""Any text as the tokens of a study's vocabulary, for Figure 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import pre_tokenizers

MOST_CHARACTERS = 10_000
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(text: str, labels: Sequence[str], tokenizer_file: Path | None = None) -> list[str]:
    """The labels of the tokens of `text`, in order.

    With the tokenizer.json that `python -m llm_experiments prepare` wrote, the tokens are exactly
    those of training. Without it each token is the longest label that the rest of the lower-cased
    text begins with, and a character that no label begins with is split into its bytes, as
    byte-level BPE does. Raises ValueError for a text that is empty or of more than 10,000
    characters, a file that is no such tokenizer, or a vocabulary without the bytes.
    """
    if not 0 < len(text) <= MOST_CHARACTERS:
        raise ValueError(f"the text has {len(text)} characters; expected 1 to {MOST_CHARACTERS}")
    if tokenizer_file is not None:
        from llm_experiments.text.tokenization import read_tokenizer  # with transformers' seconds

        tokenizer = read_tokenizer(tokenizer_file, len(labels))
        return [labels[i] for i in tokenizer.encode(text, add_special_tokens=False).ids]
    return _longest_matches(text.lower(), set(labels))


def _longest_matches(text: str, labels: set[str]) -> list[str]:
    longest, found, place = max(map(len, labels)), [], 0
    while place < len(text):
        starts = (text[place : place + size] for size in range(longest, 0, -1))
        match = next((start for start in starts if start in labels), "")
        if not match:
            ((spelled, _),) = _BYTES.pre_tokenize_str(text[place])
            if unknown := set(spelled) - labels:
                raise ValueError(f"no token spells {text[place]!r} (byte {min(unknown)!r})")
            found += list(spelled)
        else:
            found.append(match)
        place += len(match) or 1
    return found
