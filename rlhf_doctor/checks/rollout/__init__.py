"""Checks of the rollout family."""
