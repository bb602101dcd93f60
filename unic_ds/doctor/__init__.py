"""Checks of a node before a run, and of a run after its end."""
