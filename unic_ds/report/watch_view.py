"""One frame of `unic-ds watch`: a run's record as lines of text, in so many columns and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from textwrap import wrap

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from unic_ds.files.printable import printable
from unic_ds.report import event_words, health, sparkline
from unic_ds.report.health import Finding
from unic_ds.report.log_windows import LINES, RECENT, finite, teacher_shares
from unic_ds.report.run_record import Event, RunRecord, Series
from unic_ds.report.wording import duration

SHOWN = 240
"""Log lines of a sparkline, the newest."""

EVENTS, EVENT_LENGTH = 8, 200
"""Events that are shown at most, and characters of each before it is cut to the width."""

BAD = ("stalled", "loss spikes", "skipped steps", "features collapse")
"""Findings in red; the others are yellow."""

PATH = 1000
"""Characters of the longest path, whose end is shown."""

NARROWEST = 40
"""Columns of the narrowest frame; a narrower terminal cuts it."""


@dataclass(frozen=True)
class Section:
    """Lines of a frame under a title; `least` of them stay when rows are scarce."""

    lines: Sequence[Text]
    least: int
    urgency: int
    """Sections of a lower number get further rows first."""


@dataclass(frozen=True)
class Look:
    """A frame's width, its characters and the time."""

    width: int
    encoding: str
    now: datetime

    @property
    def blocks(self) -> bool:
        """True if sparklines are of block characters."""
        return sparkline.has_blocks(self.encoding)

    def line(self, text: str, style: str = "") -> Text:
        """A line that is cut at the width; characters that the terminal lacks are escaped."""
        known = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        return Text(known, style=style, no_wrap=True, overflow="crop")


def frame(
    record: RunRecord,
    *,
    width: int = 80,
    height: int | None = None,
    encoding: str = "utf-8",
    now: datetime | None = None,
    note: str = "",
) -> Group:
    """A frame of a record at a time (UTC), of at most `height` rows; `note` is its last line."""
    look = Look(max(width, NARROWEST), encoding, now or datetime.now(UTC))
    found = health.findings(record, now=look.now)
    last = [look.line(printable(note), "dim")] if note else []
    head = [*title(record, found, look)]
    if not record.series:
        head.append(look.line("waiting for the first log line"))
    sections = [
        Section([*head, *figures(record, look)], len(head) + 1, 0),
        Section(curves(record, look), 1, 3),
        Section(teachers(record, look), 2, 2),
        Section(findings_lines(record, found, look), 3, 1),
        Section(event_lines(record.events, look), 2, 4),
        Section(last, len(last), 0),
    ]
    return Group(*fitted(sections, height, look))


def fitted(sections: Sequence[Section], height: int | None, look: Look) -> list[Text]:
    """The lines of the sections in so many rows; the last line of one that is cut says so."""
    spaced = [line for s in sections if s.lines for line in (*s.lines, look.line(""))][:-1]
    if height is None or len(spaced) <= height:
        return spaced
    rows = [min(section.least, len(section.lines)) for section in sections]
    for i in sorted(range(len(sections)), key=lambda i: sections[i].urgency):
        room = height - sum(rows)
        rows[i] += max(0, min(room, len(sections[i].lines) - rows[i]))
    lines: list[Text] = []
    for section, count in zip(sections, rows, strict=True):
        left = len(section.lines) - count
        if left and count > 1:
            more = look.line(f"  and {left + 1} more lines", "dim")
            lines += [*section.lines[: count - 1], more]
        else:
            lines += section.lines[:count]
    return lines[:height]


def title(record: RunRecord, found: Sequence[Finding], look: Look) -> list[Text]:
    """Folder and state, and the bar of the run's progress."""
    state, style = state_of(record, found, look.now)
    folder, room = printable(record.folder, PATH), look.width - len(state) - 2
    if cell_len(folder) > room:  # the end tells more
        while cell_len(folder) > max(room - 3, 0):
            folder = folder[1:]
        folder = f"...{folder}"
    gap = " " * max(2, look.width - cell_len(folder) - len(state))
    first = look.line(folder + gap + state, "bold")
    first.stylize(style, len(first) - len(state))
    step, steps = record.last_step, record.steps
    if not steps:
        return [first, look.line(f"step {step:,}")] if step else [first]
    left = remaining(record) if state.startswith("logged") else None
    eta = "" if left is None else f"  ETA {duration(left)}"
    words = f" {step / steps:4.0%}  step {step:,} of {steps:,}{eta}"
    done = sparkline.bar(step / steps, max(look.width - len(words), 4), blocks=look.blocks)
    second = look.line(done + words)
    second.stylize("cyan", 0, len(done))
    return [first, second]


def state_of(record: RunRecord, found: Sequence[Finding], now: datetime) -> tuple[str, str]:
    """(state, style) of a run."""
    if record.finished:
        return "finished", "green"
    for kind in ("stalled", "stopped"):
        if any(finding.kind == kind for finding in found):
            return kind, "red"
    if not record.series or record.written is None:
        return "waiting", "yellow"
    age = duration((now - record.written).total_seconds())
    if record.steps and record.last_step >= record.steps:
        return "exporting, evaluating" if record.heartbeats else "trained, not evaluated", "yellow"
    return f"logged {age} ago", "green"


def remaining(record: RunRecord) -> float | None:
    """Seconds until the last step at the latest rate; None if they are not known."""
    rate, samples = median_of(record, "images_per_s"), record.series.get("samples")
    if not record.steps or rate is None or rate <= 0 or samples is None:
        return None
    batch = float(samples.value_N[-1]) / int(samples.step_N[-1])
    seconds = (record.steps - record.last_step) * batch / rate
    return seconds if 0 <= seconds < 1e12 else None


def median_of(record: RunRecord, name: str) -> float | None:
    """Median of the last lines' finite values; None without any."""
    series = finite(record.series.get(name), LINES)
    return float(np.median(series.value_N)) if series else None


def figures(record: RunRecord, look: Look) -> list[Text]:
    """Throughput, memory, data wait, MFU and learning rate, in as many lines as they need."""
    formats = {
        "images_per_s": "{:.4g} img/s",
        "mem_gb": "{:.3g} GB",
        "data_wait_share": "data wait {:.0%}",
        "mfu": "MFU {:.1%}",
    }
    found = {name: median_of(record, name) for name in formats}
    words = [formats[name].format(value) for name, value in found.items() if value is not None]
    if rate := finite(record.series.get("lr"), 1):
        words.append(f"lr {rate.value_N[-1]:.3g}")
    rows: list[str] = []
    for word in words:
        if rows and len(rows[-1]) + 3 + len(word) <= look.width:
            rows[-1] += f"   {word}"
        else:
            rows.append(word)
    return [look.line(row) for row in rows]


def curves(record: RunRecord, look: Look) -> list[Text]:
    """Sparklines of the last losses, of gradient norm and speed, and of the student's probes.

    Those of its agreement with the teachers are left out: they have lines of their own.
    """
    probes = [n for n in record.series if n.startswith("probe/") and n.count("/") == 1]
    probes = [n for n in probes if not n.startswith("probe/teacher ")]
    names = {"loss": "loss", "grad_norm": "gradient norm", "images_per_s": "img/s"}
    names |= {name: name.removeprefix("probe/") for name in sorted(probes)}
    lines = []
    for name, shown in names.items():
        series = record.series.get(name)
        if series is not None:
            value = f"{series.value_N[-1]:.4g}"
            text = f"{printable(shown, 15):<15} {value:>9}  "
            lines.append(curve(text, series.value_N, look))
    return lines


def curve(text: str, value_N: NDArray[np.float64], look: Look) -> Text:
    """A line that begins with a text, and shows the newest values in the rest."""
    room = look.width - len(text)
    line = look.line(text + sparkline.sparkline(value_N[-SHOWN:], room, blocks=look.blocks))
    line.stylize("cyan", len(text))
    return line


def teachers(record: RunRecord, look: Look) -> list[Text]:
    """A line for each teacher: kept pairs, its share, cosines, and their trend."""
    names = health.teacher_names(record)
    _, shares = teacher_shares(record.series, newest=RECENT)
    lines = [look.line(f"{'teacher':<15}  kept share    cls  patch  trend of the cosine", "bold")]
    for name in names:
        parts = {key: record.series.get(f"{name}/{key}_cosine") for key in ("cls", "patch")}
        kept = percent(record.series.get(f"{name}/kept"))
        text = f"{printable(name, 15):<15} {kept} {percent(shares.get(name))}"
        for series in parts.values():
            text += f" {'-' if series is None else format(series.value_N[-1], '.3f'):>6}"
        trend = next((s for s in reversed(parts.values()) if s is not None), None)
        if trend is not None:
            lines.append(curve(f"{text}  ", trend.value_N, look))
    return lines if len(lines) > 1 else []


def percent(series: Series | None) -> str:
    """Median of the last lines as %, five characters wide; a dash without any."""
    newest = finite(series, LINES)
    return f"{np.median(newest.value_N):5.0%}" if newest else "    -"


def findings_lines(record: RunRecord, found: Sequence[Finding], look: Look) -> list[Text]:
    """The findings with their remedies, wrapped."""
    if not record.series:
        return []
    if not found:
        return [look.line("health: no findings", "green")]
    lines = [look.line("health", "bold")]
    for finding in found:
        style = "red" if finding.kind in BAD else "yellow"
        message = printable(finding.message)
        for i, text in enumerate(wrap(message, look.width - 2, break_on_hyphens=False)):
            lines.append(look.line(("  " if i else "! ") + text, style))
        remedy = f"try: {printable(finding.remedy)}"
        texts = wrap(remedy, look.width - 2, break_on_hyphens=False)
        lines += [look.line("  " + text) for text in texts]
    return lines


def event_lines(events: Sequence[Event], look: Look) -> list[Text]:
    """The last events, the newest first."""
    lines = [look.line("events", "bold")]
    for event in reversed(events[-EVENTS:]):
        step = f" step {event.step:,}" if event.step is not None else ""
        about = printable(event_words.text_of(event), EVENT_LENGTH)
        name = printable(event.name, 20)
        when = event.time.astimezone().strftime("%m-%d %H:%M")
        lines.append(look.line(f"{when} {name}{step}{': ' if about else ''}{about}"))
    return lines if len(lines) > 1 else []
