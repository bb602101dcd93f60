"""Where what is made once and used by many runs is kept."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$UNIC_DS_CACHE`, or ~/.cache/unic_ds; ValueError if the user has no home."""
    if given := os.environ.get("UNIC_DS_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "unic_ds"
    except RuntimeError as error:  # a user without an entry in passwd, as in a container
        raise ValueError(
            "this user has no home; set HOME, or UNIC_DS_CACHE to a folder that may be written"
        ) from error
