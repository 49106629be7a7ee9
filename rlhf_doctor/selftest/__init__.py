"""The faults that the checks ship with, tried on the user's own machine."""
