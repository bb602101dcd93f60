"""Triton ops of unic_ds; CPU tensors take torch code of the same algebra."""
