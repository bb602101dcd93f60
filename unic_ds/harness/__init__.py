"""Evaluation harness: models and image sets for the evaluators, and a cache of features."""
