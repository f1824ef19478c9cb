"""Weight-decay sweeps of language models, measured token by token."""

from run_store import signals as signals  # Ctrl-C is one line while all else is imported
