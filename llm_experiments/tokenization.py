"""The byte-level BPE tokenizer of the paper (section 3), trained on the corpus itself."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
PAD_ID = SPECIAL_TOKENS.index("<pad>")
END_ID = SPECIAL_TOKENS.index("</s>")
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
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; the text supports at most {tokenizer.get_vocab_size()}"
        )
    return tokenizer


def token_labels(tokenizer: Tokenizer) -> list[str]:
    """What to call each token: its text, or its bytes where they are no character of their own."""
    labels = []
    for token_id in range(tokenizer.get_vocab_size()):
        name = tokenizer.id_to_token(token_id)
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        labels.append(name if token_id < len(SPECIAL_TOKENS) or "\ufffd" in text else text)
    return labels
