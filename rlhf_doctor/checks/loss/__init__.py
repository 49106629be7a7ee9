"""Checks of the loss family."""
