"""Checks of the tokens family."""
