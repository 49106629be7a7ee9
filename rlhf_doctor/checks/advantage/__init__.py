"""Checks of the advantage family."""
