"""Mathematics of comparing frozen models by their features, on one process."""
