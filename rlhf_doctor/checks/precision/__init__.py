"""Checks of the precision family."""
