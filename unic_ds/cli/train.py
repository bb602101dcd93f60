"""`unic-ds train`: `unic_ds/train.py` in one process, without a launcher."""

from unic_ds.train import VERB, main

__all__ = ["VERB", "run"]

run = main
