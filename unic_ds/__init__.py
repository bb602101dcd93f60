"""Distil several frozen vision models into one ViT student, by the UNIC method on DeepSpeed."""

__version__ = "0.1.0"
