"""Checks of the optimizer family."""
