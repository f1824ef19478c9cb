"""Loss and accuracy by token frequency of a model that exists: the practitioner's check."""

from llm_experiments.audit.checkpoints import load, load_tokenizer
from llm_experiments.audit.measuring import TokenLosses, measure, next_token_counts, tokenize

__all__ = ["TokenLosses", "load", "load_tokenizer", "measure", "next_token_counts", "tokenize"]
