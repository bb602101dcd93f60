"""Triton ops of unic_ds, a folder each; CPU tensors take the same algebra in torch."""
