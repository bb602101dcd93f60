"""Frozen teachers: found on disk, built, run, standardised; they know no data, student or loss."""
