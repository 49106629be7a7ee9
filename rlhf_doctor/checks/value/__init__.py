"""Checks of the value family."""
