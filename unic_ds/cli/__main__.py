"""`python -m unic_ds.cli` is `unic-ds`."""

from unic_ds.cli import main

main()
