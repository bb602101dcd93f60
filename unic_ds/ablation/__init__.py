"""Ablations: a grid of settings over several seeds, from its description to one table."""
