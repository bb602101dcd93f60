"""Tables that verbs print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from unic_ds.files.printable import printable


def show(rows: Sequence[Mapping[str, object]], *, as_json: bool) -> None:
    """Print mappings by their `name`: a table each, or one JSON object for programs."""
    if as_json:
        print(json.dumps({row["name"]: dict(row) for row in rows}))
        return
    for row in rows:
        show_table(
            [(key, value) for key, value in row.items() if key != "name"],
            title=str(row["name"]),
            wrap=False,
        )


def show_table(
    rows: Iterable[Sequence[object]],
    *,
    header: Sequence[str] = (),
    title: str = "",
    compact: bool = False,
    wrap: bool = True,
) -> None:
    """Print rows in columns; with a header in a frame, unless `compact`."""
    from rich import console, table, text  # 50 ms; --help does not need it

    grid = table.Table(
        *header,
        title=text.Text(printable(title)) if title else None,
        title_justify="left",
        show_header=bool(header),
        pad_edge=not compact,
        padding=(0, 1, 0, 0) if compact else (0, 1),
    )
    if compact or not header:
        grid.box = None
    for row in rows:
        # Text from outside may look like rich's markup.
        grid.add_row(*(text.Text(printable(cell)) for cell in row))
    console.Console(soft_wrap=not wrap).print(grid)
