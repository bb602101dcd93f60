"""One HTML page about one or several runs, complete in itself: it loads nothing.

What it shows of file names, teachers, events and licences may come from anyone: jinja2 escapes it,
control characters are shown as their escapes, and a Content-Security-Policy lets no script run but
the page's own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from unic_ds import __version__
from unic_ds.files import write_atomic
from unic_ds.files.printable import printable
from unic_ds.report import curves, page_pictures, run_record, sections, teacher_section
from unic_ds.report.run_record import RunRecord

FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"

RUNS = curves.COLOURS * curves.DASHES
"""The most runs of a report: as many curves as colour and dashes tell apart."""

BYTES = 5_000_000
"""The most bytes of a page."""

LONGEST = 2000
"""Characters that a page shows of one text from outside: captions say how pictures were made."""


def write_for(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page of these run folders; its path, by default in the folder of the only run.

    A run of several stages is shown by its current one, as in `unic-ds watch`.

    ValueError for too many runs or a folder that is none, RuntimeError if `out` cannot be written.
    """
    check_folders(folders)
    current = [run_record.current_stage(folder) for folder in folders]
    check_folders(current)  # a run and its current stage are the same
    records = [run_record.read(folder) for folder in current]
    out = out or (folders[0] / FILE if len(folders) == 1 else Path(FILE))
    write_text(render(records), out)
    return out


def write_text(text: str, out: Path) -> None:
    """Write a page; RuntimeError if `out` cannot be written."""
    try:
        write_atomic(out, text)
    except OSError as error:
        raise RuntimeError(
            f"the report {str(out)!r} cannot be written ({error.strerror}); name another file with"
            " --out"
        ) from None


def check_folders(folders: Sequence[Path]) -> None:
    """Raise ValueError for no folder, too many, or one that is given twice."""
    if not 0 < len(folders) <= RUNS:
        raise ValueError(
            f"a report is of 1 to {RUNS} runs, as many curves as its colours and dashes tell"
            f" apart, got {len(folders)}"
        )
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"the run {str(folder)!r} is given twice; name each run once")
        seen.add(folder.resolve())


def render(records: Sequence[RunRecord], now: datetime | None = None) -> str:
    """The page about these runs as HTML; ValueError if it would pass `BYTES`."""
    labels = sections.labels_of([record.folder for record in records])
    text = (
        environment()
        .get_template("report.html.jinja")
        .render(
            title=title_of(labels),
            several=len(records) > 1,
            unfinished=any(not record.finished for record in records),
            written=sections.time_text(now or datetime.now(UTC)),
            version=__version__,
            style=style(),
            script=script(),
            policy=policy(),
            **facts_of(records, labels),
            **tables_of(records, labels),
            **curves_of(records, labels),
            **pictures_of(records, labels),
            compared=teacher_section.read([record.folder for record in records], labels),
        )
    )
    if len(text) > BYTES or len(text.encode("utf-8", "backslashreplace")) > BYTES:
        raise ValueError(
            f"the report would have {len(text) / 1e6:.1f} MB, more than {BYTES / 1e6:.0f}; give"
            " fewer runs"
        )
    return text


def facts_of(records: Sequence[RunRecord], labels: Sequence[str]) -> dict[str, object]:
    """Names of the template for each run, its settings, teachers and events."""
    differing, settings = sections.settings([record.settings for record in records])
    return {
        "runs": [sections.run_of(r, label) for r, label in zip(records, labels, strict=True)],
        "differing": differing,
        "settings": settings,
        "teachers": sections.teachers(records, labels),
        "events": sections.events(records, labels),
        "event_counts": [sections.event_counts(record) for record in records],
        "event_total": sum(len(record.events) for record in records),
    }


def tables_of(records: Sequence[RunRecord], labels: Sequence[str]) -> dict[str, object]:
    """Tables of the evaluations, and the runs that have none."""
    pairs = [(record.comparison, label) for record, label in zip(records, labels, strict=True)]
    together = sections.students_side_by_side([found for found, _ in pairs], labels)
    each = [sections.evaluation(found, label) for found, label in pairs if found and found.rows]
    return {
        "evaluations": [*([together] if together else []), *each],
        "unevaluated": [label for found, label in pairs if not (found and found.rows)],
    }


def curves_of(records: Sequence[RunRecord], labels: Sequence[str]) -> dict[str, object]:
    """The charts, and the points of their curves."""
    series = [curves.with_shares(record) for record in records]
    groups = curves.groups(series, labels)
    charts = [chart for group in groups for chart in group.charts]
    return {
        "groups": groups,
        "charts_full": len(charts) >= curves.CHARTS,
        "colours": curves.COLOURS,
        "dashes": curves.DASHES,
        "data": curves.as_json(series, charts),
    }


def pictures_of(records: Sequence[RunRecord], labels: Sequence[str]) -> dict[str, object]:
    """The pictures, and sentences about those that are not there."""
    pictures, problems = page_pictures.embedded([record.folder for record in records], labels)
    return {
        "pictures": pictures,
        "picture_problems": problems,
        "without_pictures": page_pictures.HOW,
    }


def title_of(labels: Sequence[str]) -> str:
    """Title of the page."""
    return labels[0] if len(labels) == 1 else f"{len(labels)} runs: {', '.join(labels)}"


@cache
def environment() -> Environment:
    """The templates; every text is escaped, also for a reader's eyes."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["figure"] = figure
    found.filters["hours"] = hours
    return found


def visible(value: object) -> object:
    """A value as a page shows it: text as one line of visible characters, cut if it is long.

    What the template marks as safe, and macros, stay as they are.
    """
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return value if value.startswith("data:image/webp;base64,") else printable(value, LONGEST)


def figure(value: float) -> str:
    """A number at four digits."""
    return f"{value:.4g}"


def hours(value: float) -> str:
    """Hours at three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@cache
def style() -> str:
    """The page's style sheet."""
    return (TEMPLATES / "report.css").read_text()


@cache
def script() -> str:
    """The page's only script: uPlot, which draws the charts, its licence, and what uses it."""
    licence, *parts = (
        (TEMPLATES / name).read_text() for name in ("uPlot.LICENSE", "uPlot.min.js", "report.js")
    )
    return "\n".join([f"/*!\n{licence}\n*/", *parts])


def policy() -> str:
    """Content-Security-Policy: this script, this style sheet, pictures inside the page, no more."""
    parts = (
        "default-src 'none'",
        f"script-src {hash_source(script())}",
        f"style-src {hash_source(style())}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(parts)


def hash_source(text: str) -> str:
    """A policy's name for an inline script or style sheet."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
