"""Weight-decay sweeps of language models, measured token by token."""
