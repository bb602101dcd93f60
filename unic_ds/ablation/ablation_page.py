"""The page of a grid: table, picture, settings and curves in one HTML file that loads nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from unic_ds import __version__
from unic_ds.ablation import plot, tables
from unic_ds.ablation.results import Results
from unic_ds.process import console
from unic_ds.report import curves, page, page_pictures, run_record, sections
from unic_ds.report.page_pictures import Picture
from unic_ds.report.run_record import Series

FILE, TEMPLATE = "ablation.html", "ablation.html.jinja"
CAPTION = "A dot per seed, a stroke for the mean of a cell; dashed: the best teacher's mean"
QUANTITY = "loss"
"""The series of a log that the page shows."""
CELLS = 60
"""Cells whose settings the page shows."""


def render(results: Results, png: bytes, now: datetime | None = None) -> str:
    """The page as HTML."""
    return (
        page.environment()
        .get_template(TEMPLATE)
        .render(
            title=f"Ablation {results.study.grid.name}",
            written=sections.time_text(now or datetime.now(UTC)),
            version=__version__,
            style=page.style(),
            script=page.script(),
            policy=page.policy(),
            columns=tables.columns(results),
            blocks=tables.blocks(results),
            notes=tables.notes(results),
            picture=picture(png, plot.left_out(results)),
            **settings_of(results),
            **curves_of(results),
        )
    )


def picture(png: bytes, note: str) -> Picture:
    """The picture with its data; the note is added to its caption."""
    image, webp = page_pictures.compressed(page_pictures.decoded(png), page_pictures.PAGE_BYTES)
    uri = f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
    caption = f"{CAPTION}; {note}" if note else CAPTION
    return Picture("", "plot", caption, "plot", uri, image.width, image.height)


def settings_of(results: Results) -> dict[str, object]:
    """Names of the template for the settings that differ."""
    study = results.study
    shown = list(study.cells)[:CELLS]
    configs = [study.config(cell, study.grid.seeds[0]) for cell in shown]
    differing = sections.settings(configs)[0] if len(configs) > 1 else []
    differing = [row for row in differing if row.name not in ("recipe", "cache")]
    caches = [
        "none" if study.live(cell) else cfg.cache for cell, cfg in zip(shown, configs, strict=True)
    ]
    if len(set(caches)) > 1:
        differing.append(sections.Setting("teachers.cache", caches, ""))
    of = first_of(len(shown), len(study.cells))
    return {"cells": shown, "differing": differing, "settings_of": of}


def first_of(shown: int, count: int) -> str:
    """Note on cells that a part of the page leaves out; empty if there are none."""
    if shown == count:
        return ""
    return f"The first {shown} of {count:,} cells; the table of the results has all."


def curves_of(results: Results) -> dict[str, object]:
    """Names of the template for the curves: one run of each cell."""
    found = series_of(results)
    labels, series = list(found), list(found.values())
    groups = curves.groups(series, labels) if series else []
    charts = [chart for group in groups for chart in group.charts]
    seed = results.study.grid.seeds[0]
    return {
        "runs": [{"label": label} for label in labels],
        "several": len(labels) > 1,
        "groups": groups,
        "charts_full": False,
        "colours": curves.COLOURS,
        "dashes": curves.DASHES,
        "data": curves.as_json(series, charts),
        "curves_of": f"Seed {seed}; losses of cells with other losses or teachers do not compare."
        f" {first_of(len(labels), len(results.cells))}".rstrip(),
    }


def series_of(results: Results) -> dict[str, Mapping[str, Series]]:
    """Cell -> its curve, of the first cells with one: as many as colour and dashes tell apart."""
    found: dict[str, Mapping[str, Series]] = {}
    for run in results.study.runs_of(results.study.grid.seeds[0]):
        if len(found) == page.RUNS:
            break
        if not run.finished:
            continue
        try:
            series = run_record.read(run.folder).series
        except ValueError as error:
            console.say(f"the page has no curve of {run.describe()}: {error}")
            continue
        if QUANTITY in series:
            found[run.cell] = {QUANTITY: series[QUANTITY]}
    return found


def write(results: Results, png: bytes) -> Path:
    """Write the page; returns its path."""
    file = results.study.out / FILE
    page.write_text(render(results, png), file)
    return file
