"""Files inside packages of eval-packages.txt, whose code is not imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def packaged(package: str, *names: str) -> list[Path] | None:
    """Paths of a package's files; None if it is not installed."""
    spec = find_spec(package)  # does not run the package's code, as it has no parent
    if spec is None or spec.origin is None:
        return None
    return [Path(spec.origin).parent / name for name in names]
