"""`unic-ds watch`: shows a run in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb."""

    once: bool = option(False, "print one frame and end, as if stdout is no terminal")


VERB = Verb(
    name="watch",
    summary="show a run in the terminal: progress, losses, teachers, health, events; q ends it",
    options=Options,
    arguments={"RUN": "run folder; also a finished one, or one of another machine"},
)


def run(argv: Sequence[str]) -> int:
    """Show the run; return the exit code."""
    call = VERB.read(argv)
    from unic_ds.report import watch_loop

    return watch_loop.run(Path(call.arguments[0]), once=call.options.once)
