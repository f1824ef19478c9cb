"""Corpora, tokenizers, token ids and their counts."""
