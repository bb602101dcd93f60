"""Check of installed packages against the oldest versions that setup.py allows."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.version import Version

FLOOR = re.compile(r'([\w.-]+)>=([\w.]+)(?:; extra == "(?!(?:dev|export|track)").+")?')
"""A package and its floor, except of extras that training does not import."""


def check() -> None:
    """ValueError if an installed package is older than unic_ds needs.

    A checkout that was never installed declares nothing, so nothing is checked. A missing package
    fails at its import.
    """
    declared: list[str] = []
    with suppress(PackageNotFoundError):
        declared = requires("unic_ds") or []
    old: list[tuple[str, str, str]] = []
    for name, floor in (match.groups() for match in map(FLOOR.fullmatch, declared) if match):
        with suppress(PackageNotFoundError):
            found = version(name)
            if release(found) < release(floor):
                old.append((name, found, floor))
    if old:
        has = ", ".join(f"{name} {found}" for name, found, _ in old)
        needs = " ".join(f"'{name}>={floor}'" for name, _, floor in old)
        raise ValueError(
            f"too old for unic_ds: {has}; pip install {needs}, or use a newer container"
            " (docs/install.md)"
        )


def release(found: str) -> Version:
    """The release that a version belongs to: a container's 2.11.0a0+git.nv25 belongs to 2.11.0."""
    return Version(Version(found).base_version)
