"""`unic-ds report`: writes one HTML page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb."""

    out: str = option("", "file to write; default: RUN/report.html, of several runs ./report.html")


VERB = Verb(
    name="report",
    summary="write one HTML page about runs: settings, curves, evaluations, events, cost",
    options=Options,
    arguments={"RUN": "run folder", "[RUN...]": "more of them, to compare"},
)


def run(argv: Sequence[str]) -> int:
    """Write the page and print its path; return the exit code."""
    call = VERB.read(argv)
    from unic_ds.report import page

    out = Path(call.options.out) if call.options.out else None
    print(page.write_for([Path(word) for word in call.arguments], out))
    return 0
