"""Figures, tables and one HTML page from the run store."""

from run_store import signals as signals  # Ctrl-C is one line while all else is imported
