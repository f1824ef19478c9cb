"""Figures, tables and one HTML page from the run store."""
