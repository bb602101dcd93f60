"""`unic-ds quickstart`: prepares the demonstration."""

from __future__ import annotations

from collections.abc import Sequence

from unic_ds import demo
from unic_ds.config.verb import NoOptions, Verb

VERB = Verb(
    name="quickstart",
    summary="prepare the demonstration's teachers and images",
    options=NoOptions,
)


def run(argv: Sequence[str]) -> int:
    """Prepare the demonstration; return the exit code."""
    VERB.read(argv)
    print(f"ready: {demo.prepare()}")
    return 0
