"""Checks of the metrics family."""
