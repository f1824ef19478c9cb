"""The paper's Appendix D: which classes pay for weight decay in image classification."""

from run_store import signals as signals  # Ctrl-C is one line while all else is imported
