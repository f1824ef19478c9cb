"""Which text a run is trained on, and how it is cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm_experiments.text.corpora import CorpusConfig
from llm_experiments.text.tokenization import SMALLEST_VOCABULARY
from run_store.command_line import check_at_least


@dataclass(frozen=True, kw_only=True)
class DataConfig(CorpusConfig):
    """Which text, cut how."""

    vocab_size: int = 32005
    """entries of the tokenizer, 5 special tokens and 256 bytes included"""
    context: int = 128
    """tokens of a sequence"""
    packing: bool = False
    """cut the joined documents into sequences, instead of truncating each at the context"""
    num_sequences: int | None = None
    """train on this many sequences only (a fixed random choice), instead of all"""
    held_out: int = 0
    """keep this many sequences back, and measure them at every evaluation"""
    checkpoint_dir: Path | None = None
    """start from the weights in this local folder (official format, safetensors)"""
    cache_dir: Path = Path("cache")
    """where tokenizers and token ids are kept"""

    def __post_init__(self) -> None:
        check_at_least("vocab_size", self.vocab_size, SMALLEST_VOCABULARY)
        check_at_least("context", self.context, 2)
        if self.num_sequences is not None:
            check_at_least("num_sequences", self.num_sequences, 1)
        check_at_least("held_out", self.held_out, 0)
