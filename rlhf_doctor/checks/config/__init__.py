"""Checks of the config family."""
