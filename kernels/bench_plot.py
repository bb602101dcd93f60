"""Pictures of the benchmark's rows: times measured, costs counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    "plain": "#9e9e9e",
    "reference": "#616161",
    "concatenated": "#c9a227",
    "compiled": "#a05195",
    "ours": "#1f77b4",
    "ours/none": "#9ecae1",
    "ours/hidden": "#1f77b4",
    "ours/all": "#08306b",
}
TITLES = {
    "step": "ladder + loss",
    "ladder": "ladder",
    "distill_loss": "distillation loss",
    "moments": "moments",
}
COUNTED = {
    "launches": "kernel launches forward",
    "gigabytes": "GB read and written forward",
    "backward_tflop": "TFLOP backward",
    "kept_gigabytes": "GB kept for backward",
}
Row = dict[str, Any]


def draw(rows: list[Row], folder: Path) -> Iterator[Path]:
    """Draw a picture per op of its times, and one of its counts; yield their files."""
    folder.mkdir(parents=True, exist_ok=True)
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        if times := [row for row in of_op if row["kind"] == "measured"]:
            yield picture(measured(op, times), folder / f"{op}_measured.png")
        yield picture(counted(op, of_op), folder / f"{op}_counted.png")


def picture(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return file


def measured(op: str, rows: list[Row]) -> Any:
    """Draw median and 20 - 80 % of forward, backward and both: a panel per case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = panels(len(cases))
    for ax, case in zip(axes, cases, strict=True):
        of_case = [row for row in rows if row["case"] == case]
        modes = {row["mode"] for row in of_case}
        named = {"fwd": "forward", "bwd": "backward", "both": "both"}
        values = [
            Bar(row["way"], named[row["mode"]], row["ms"], row["ms_20"], row["ms_80"])
            for row in of_case
        ]
        bars(ax, values, [name for mode, name in named.items() if mode in modes])
        ax.set_title(f"{case}, {of_case[0]['images']} images")
        ax.set_ylabel("milliseconds")
    whose = rows[0]
    title = f"{TITLES[op]}: MEASURED, bf16, median and 20-80 %\n{whose['device']}"
    return finish(figure, axes, f"{title}, torch {whose['torch']}, commit {whose['commit']}")


def counted(op: str, rows: list[Row]) -> Any:
    """Draw launches, traffic, FLOPs and memory kept: a panel each, groups are cases."""
    costs = [row for row in rows if row["kind"] == "counted"]
    shown = [key for key in COUNTED if any(row.get(key) for row in costs)]
    figure, axes = panels(len(shown))
    cases = list(dict.fromkeys(row["case"] for row in costs))
    for ax, key in zip(axes, shown, strict=True):
        bars(ax, [Bar(row["way"], row["case"], *[row.get(key) or 0] * 3) for row in costs], cases)
        ax.set_ylabel(COUNTED[key])
        ax.set_xlabel("case, at its GPU batch")
    title = f"{TITLES[op]}: COUNTED from the code, no device; of the GPU path\n"
    return finish(figure, axes, f"{title}torch {costs[0]['torch']}, commit {costs[0]['commit']}")


def panels(count: int) -> tuple[Any, list[Axes]]:
    """Return panels in one row, two rows from four on."""
    columns = 2 if count > 3 else count
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.2 * columns, 3.6 * lines + 0.6))
    every = [axes] if count == 1 else list(axes.flat)
    for spare in every[count:]:
        spare.set_visible(False)
    return figure, every[:count]


class Bar(NamedTuple):
    """A bar of a way in a group, and the span that its whisker shows."""

    way: str
    group: str
    value: float
    low: float
    high: float


def bars(ax: Axes, values: list[Bar], groups: list[str]) -> None:
    """Draw a bar per way in every group, with its value on top."""
    ways = list(dict.fromkeys(bar.way for bar in values))
    width = 0.84 / len(ways)
    most = max(bar.high for bar in values)
    size = 7 if len(ways) * len(groups) <= 12 else 5.5
    for i, way in enumerate(ways):
        of_way = [bar for bar in values if bar.way == way]
        shift = (i - (len(ways) - 1) / 2) * width
        positions = [groups.index(bar.group) + shift for bar in of_way]
        heights = [bar.value for bar in of_way]
        ax.bar(positions, heights, width * 0.92, label=way, color=COLOURS[way])
        for position, bar in zip(positions, of_way, strict=True):
            if bar.low < bar.high:
                span = [[bar.value - bar.low], [bar.high - bar.value]]
                ax.errorbar(position, bar.value, span, color="black", lw=0.8, capsize=2)
            top, text = bar.high + most * 0.03, short(bar.value)
            ax.text(position, top, text, rotation=90, ha="center", va="bottom", fontsize=size)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylim(0, most * 1.28)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    ax.set_axisbelow(True)


def short(value: float) -> str:
    """Return a number in three digits, for the top of a bar."""
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.3g}"


def finish(figure: Any, axes: list[Axes], title: str) -> Any:
    """Add one legend for all panels, and the title."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure
