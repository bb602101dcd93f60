"""`unic-ds pack verify`: proves that a pack is complete and unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unic_ds.config.verb import NoOptions, Verb

VERB = Verb(
    name="pack verify",
    summary="prove that a pack is complete and unchanged: checksums, headers, index",
    options=NoOptions,
    arguments={"OUT": "folder that `unic-ds pack` wrote"},
)


def run(argv: Sequence[str]) -> int:
    """Verify a pack; return the exit code."""
    call = VERB.read(argv)
    from unic_ds.data import verify

    print(verify.verify(Path(call.arguments[0])))
    return 0
