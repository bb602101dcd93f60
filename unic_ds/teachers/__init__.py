"""Frozen teachers: located, built, run and standardised, without data, student or loss."""
