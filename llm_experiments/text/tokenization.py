"""The byte-level BPE tokenizer of the paper (section 3), trained on the corpus itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from run_store.input_files import parse_json, read_file

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
PAD_ID = SPECIAL_TOKENS.index("<pad>")
END_ID = SPECIAL_TOKENS.index("</s>")
_SMALLEST = len(SPECIAL_TOKENS) + 256
_MOST_BYTES = 2**28
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Lower-casing byte-level BPE; a pair must occur twice to be merged.

    On the IMDB training reviews with 32,005 entries this gives the paper's token counts.

    Raises:
        ValueError: a vocabulary larger than the text supports.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.encode_special_tokens = True  # "<pad>" in a document is text, as in training
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; the text supports at most {tokenizer.get_vocab_size()}"
        )
    return tokenizer


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """A tokenizer that `train_tokenizer` made and saved, and no other.

    Others bring patterns of their own, which can take for ever to match.

    Raises:
        ValueError: the file is not such a tokenizer, or not one of ``vocab_size`` entries.
    """
    content = read_file(path, most_bytes=_MOST_BYTES)
    document = parse_json(content, str(path))
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    expected = json.loads(train_tokenizer((), _SMALLEST).to_str())
    if _frame(document) != _frame(expected) or not isinstance(vocab, dict):
        raise ValueError(f"{path} is not a tokenizer that was trained here")
    ids = [number for number in vocab.values() if type(number) is int]
    if len(vocab) != vocab_size or sorted(ids) != list(range(vocab_size)):
        raise ValueError(f"{path} has other ids than 0 to {vocab_size - 1}")
    if any(vocab.get(token) != i for i, token in enumerate(SPECIAL_TOKENS)):
        raise ValueError(f"{path} has other special tokens than {', '.join(SPECIAL_TOKENS)}")
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as error:  # Rust's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True  # which its file does not tell
    return tokenizer


def _frame(document: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings, without what it learned."""
    model = document.get("model")
    if isinstance(model, dict):
        model = {name: part for name, part in model.items() if name not in ("vocab", "merges")}
    return document | {"model": model}


def token_labels(tokenizer: Tokenizer) -> list[str]:
    """What to call each token: its text, or its bytes where they are no character of their own."""
    labels = []
    for token_id in range(tokenizer.get_vocab_size()):
        name = tokenizer.id_to_token(token_id)
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        labels.append(name if token_id < len(SPECIAL_TOKENS) or "\ufffd" in text else text)
    return labels
