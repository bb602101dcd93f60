"""Evaluation of frozen features: an evaluator a file, and their registry."""
