"""Checks of the reward family."""
