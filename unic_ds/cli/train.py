"""`unic-ds train`: what `deepspeed unic_ds/train.py` runs, in one process."""

from unic_ds.train import VERB, main

__all__ = ["VERB", "run"]

run = main
