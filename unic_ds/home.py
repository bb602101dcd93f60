"""Where what is made once and used by many runs is kept."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$UNIC_DS_CACHE`, or ~/.cache/unic_ds."""
    given = os.environ.get("UNIC_DS_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "unic_ds"
