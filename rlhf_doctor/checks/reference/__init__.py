"""Checks of the reference family."""
