"""`unic-ds import-unic`: writes a published checkpoint as a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unic_ds.config.verb import NoOptions, Verb
from unic_ds.files.printable import printable

VERB = Verb(
    name="import-unic",
    summary="write a published UNIC checkpoint as a folder that timm loads",
    options=NoOptions,
    arguments={"PATH": "published checkpoint, as unic.pth", "OUT": "new folder"},
)


def run(argv: Sequence[str]) -> int:
    """Import a published checkpoint; return the exit code."""
    path, out = VERB.read(argv).arguments
    from unic_ds.weights import import_unic

    print(printable(import_unic.import_unic(Path(path), Path(out)), 4096))
    return 0
