"""Checks of the kl family."""
