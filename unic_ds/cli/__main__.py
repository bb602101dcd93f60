"""`python -m unic_ds.cli` is `unic-ds`."""

from unic_ds.cli import main

if __name__ == "__main__":  # worker processes import this file, too
    main()
