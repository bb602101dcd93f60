"""Curves of a report: which charts there are, and their points, few enough for a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unic_ds.report.log_windows import teacher_shares
from unic_ds.report.run_record import RunRecord, Series

POINTS = 2_000
"""The most points of a curve: as many as a wide screen has columns."""

CHARTS = 300
"""The most charts of a page; a run with ten teachers has 200."""

ALL_POINTS, FEWEST = 200_000, 64
"""Points of all curves of a page (1.4 MB of text), and the fewest of a curve of a log that long."""

COLOURS, DASHES = 8, 4
"""Styles of `report.css` and `report.js`; 32 lines have no two alike."""

PROBE, AGREEMENT = "probe/", "probe/teacher "
"""Prefixes of a probe's series; `probe/teacher NAME MEASURE` compares student and teacher."""

TITLES = {
    "loss": ("Distillation loss", "What the optimiser minimises, averaged over a log line's steps"),
    "cls_cosine": ("Cosine similarity, CLS token", "1: the direction of the teacher's"),
    "patch_cosine": ("Cosine similarity, patch tokens", "1: the direction of the teacher's"),
    "cls_smooth_l1": ("Smooth L1, CLS token", "On standardised targets"),
    "patch_smooth_l1": ("Smooth L1, patch tokens", "On standardised targets"),
    "image_loss": ("Loss of an image", "A teacher's loss before weights and dropping"),
    "kept": ("Kept share", "Share of images on which the teacher's loss counted"),
    "weight": ("Weight in the loss", "Sum of the coefficients of its images"),
    "weight_share": ("Share of the weight", "A teacher's weight over that of all teachers"),
    "loss_share": ("Share of the loss", "A teacher's part of the weighted loss"),
    "hardest_other": (
        "Images whose hardest teacher was another",
        "Lazy dropping: than the one of the largest running loss, in steps that run all teachers",
    ),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "Before clipping"),
    "skipped": ("Skipped steps", "Steps of a log line that the guard skipped"),
    "images_per_s": ("Images per second", "All ranks together, without probes"),
    "data_wait_share": ("Data wait", "Share of the time in which a rank waited for images"),
    "mem_gb": ("Peak memory, GB", "Of a rank's GPU; of its process without one"),
    "tflops": ("TFLOP/s per device", ""),
    "mfu": ("Model FLOPs utilisation", "TFLOP/s over the device's peak"),
    "bad_images": ("Unreadable images", "So far; each was replaced by another"),
    "probe_s": ("Seconds of a probe", ""),
}
"""Title and explanation of a quantity; others have their name."""

GROUPS = {
    "Loss": (
        *("loss", "cls_cosine", "patch_cosine", "cls_smooth_l1", "patch_smooth_l1", "image_loss"),
    ),
    "Balance of the teachers": (
        *("loss_share", "weight_share", "kept", "weight", "hardest_other"),
    ),
    "Probes": (),
    "Probes of the agreement with each teacher": (),
    "Optimisation": ("lr", "grad_norm", "skipped"),
    "Throughput, memory and data": (
        *("images_per_s", "data_wait_share", "mem_gb", "tflops", "mfu", "bad_images", "probe_s"),
    ),
    "Further quantities": (),
}
"""Groups of charts, in the order of the page; the last takes what no other names."""

LEFT_OUT = ("samples", "step")
LOGARITHMIC = {"loss", "image_loss", "cls_smooth_l1", "patch_smooth_l1", "lr", "grad_norm"}
"""Quantities that are worth a logarithmic axis."""


@dataclass(frozen=True)
class Line:
    """A curve of a chart."""

    label: str
    run: int
    name: str
    """Of the series."""


@dataclass(frozen=True)
class Summary:
    """A curve in numbers."""

    label: str
    last: float
    least: float
    most: float
    step: int
    """Of the last value."""


@dataclass(frozen=True)
class Chart:
    """A chart, and what it says in numbers."""

    number: int
    title: str
    note: str
    lines: Sequence[Line]
    summaries: Sequence[Summary]
    logarithmic: bool
    """True if the switch to a logarithmic axis applies."""


@dataclass(frozen=True)
class Group:
    """Charts under a heading."""

    title: str
    charts: Sequence[Chart]


def with_shares(record: RunRecord) -> dict[str, Series]:
    """The series of a run, and each teacher's share of the weight without that of the loss."""
    key, shares = teacher_shares(record.series)
    if key != "weight":  # `loss_share` is in the series already
        return dict(record.series)
    return {**record.series, **{f"{name}/weight_share": share for name, share in shares.items()}}


def groups(runs: Sequence[Mapping[str, Series]], labels: Sequence[str]) -> list[Group]:
    """The charts of runs, whose labels are those of the curves if there are several runs."""
    number = 0
    found = []
    for title, charts in sorted_into_groups(runs).items():
        made = []
        for key in charts:
            lines = lines_of(key, runs, labels)
            if lines and number < CHARTS:
                made.append(chart(key, lines, runs, number=number))
                number += 1
        if made:
            found.append(Group(title, made))
    return found


def sorted_into_groups(runs: Sequence[Mapping[str, Series]]) -> dict[str, list[str]]:
    """Title of a group -> its charts' keys: a quantity's name, with its teacher for several runs.

    A key `/METRIC` is of all teachers, one `TEACHER/METRIC` of one.
    """
    names = list(dict.fromkeys(name for run in runs for name in run if name not in LEFT_OUT))
    found: dict[str, list[str]] = {title: [] for title in GROUPS}
    for name in names:
        key = key_of(name, several=len(runs) > 1)
        into = found[group_of(key)]
        if key not in into:
            into.append(key)
    for title, order in GROUPS.items():
        if order:
            found[title].sort(key=lambda key: order.index(key.rpartition("/")[2]))
    return found


def key_of(name: str, *, several: bool) -> str:
    """Key of the chart that has a series."""
    if name.startswith(AGREEMENT) and not several:
        return f"{AGREEMENT} {name.removeprefix(AGREEMENT).partition(' ')[2]}"
    if name.startswith(PROBE):
        parts = name.split("/")
        return name if several else "/".join(parts[:2])
    _, slash, metric = name.rpartition("/")
    return name if several or not slash else f"/{metric}"


def group_of(key: str) -> str:
    """Title of the group that a chart belongs to."""
    if key.startswith(AGREEMENT):
        return "Probes of the agreement with each teacher"
    if key.startswith(PROBE):
        return "Probes"
    metric = key.rpartition("/")[2]
    return next((title for title, of in GROUPS.items() if metric in of), "Further quantities")


def lines_of(key: str, runs: Sequence[Mapping[str, Series]], labels: Sequence[str]) -> list[Line]:
    """The curves of a chart: of one run by teacher or model, of several by run."""
    if len(runs) > 1:
        return [Line(labels[i], i, key) for i, run in enumerate(runs) if has_values(run.get(key))]
    (run,) = runs
    return [
        Line(line_label(name), 0, name)
        for name, series in run.items()
        if name not in LEFT_OUT and key_of(name, several=False) == key and has_values(series)
    ]


def line_label(name: str) -> str:
    """Label of a series in the chart of one run: the teacher or model, or the quantity."""
    if name.startswith(AGREEMENT):
        return name.removeprefix(AGREEMENT).partition(" ")[0]
    if name.startswith(PROBE):
        return name.split("/", 2)[2] if name.count("/") > 1 else "student"
    return name.rpartition("/")[0] or name


def has_values(series: Series | None) -> bool:
    """True if a series has a finite value."""
    return series is not None and bool(np.isfinite(series.value_N).any())


def chart(
    key: str, lines: Sequence[Line], runs: Sequence[Mapping[str, Series]], *, number: int
) -> Chart:
    """A chart of these curves."""
    owner, _, metric = key.rpartition("/")
    if key.startswith(AGREEMENT):
        owner, _, metric = key.removeprefix(AGREEMENT).partition(" ")
        title, note = f"{metric}: {owner}" if owner else metric, "On a fixed sample of images"
    elif key.startswith(PROBE):
        title, note = key.removeprefix(PROBE).replace("knn", "kNN"), "On a fixed sample of images"
    else:
        title, note = TITLES.get(metric, (metric, ""))
        title = f"{title}: {owner}" if owner else title
    summaries = [summary(line.label, runs[line.run][line.name]) for line in lines]
    return Chart(number, title, note, lines, summaries, metric in LOGARITHMIC)


def summary(label: str, series: Series) -> Summary:
    """The last, smallest and largest finite value of a series that has one."""
    finite_N = np.isfinite(series.value_N)
    step_N, value_N = series.step_N[finite_N], series.value_N[finite_N]
    ends = float(value_N[-1]), float(value_N.min()), float(value_N.max())
    return Summary(label, *ends, step=int(step_N[-1]))


def points_each(count: int) -> int:
    """Points of each of so many curves, so that all of them fit the page."""
    return max(FEWEST, min(POINTS, ALL_POINTS // max(count, 1)))


def envelope(series: Series, points: int) -> Series:
    """A series in at most `points` points: the extremes of each bucket of log lines, in order.

    The points lie on the bucket's first and last step, so that series with the same steps still
    have the same afterwards. Values that are not finite become NaN, and are left out of extremes.
    """
    step_N, value_N = series.step_N, np.where(np.isfinite(series.value_N), series.value_N, np.nan)
    if len(step_N) <= points:
        return Series(step_N, value_N)
    length = math.ceil(len(step_N) / (points // 2))
    buckets = math.ceil(len(step_N) / length)
    padded_BL = np.full((buckets, length), np.nan)
    padded_BL.flat[: len(value_N)] = value_N
    low_B = np.where(np.isnan(padded_BL), np.inf, padded_BL).argmin(1)
    high_B = np.where(np.isnan(padded_BL), -np.inf, padded_BL).argmax(1)
    order_B2 = np.sort(np.stack([low_B, high_B], 1), axis=1)
    first_B = np.arange(buckets) * length
    last_B = np.minimum(first_B + length, len(step_N)) - 1
    values_B2 = np.take_along_axis(padded_BL, order_B2, 1)
    kept_M = np.ones(2 * buckets, bool)
    kept_M[1::2] = last_B > first_B  # a bucket of one line has one point
    steps_M = step_N[np.stack([first_B, last_B], 1).ravel()]
    return Series(steps_M[kept_M], values_B2.ravel()[kept_M])


def as_json(runs: Sequence[Mapping[str, Series]], charts: Sequence[Chart]) -> str:
    """The points of all curves, and which chart has which, for `report.js`.

    It stands inside a <script> element, so `<` is escaped: no text can end that.
    """
    wanted = {(line.run, line.name) for found in charts for line in found.lines}
    points = points_each(len(wanted))
    data = [
        packed({name: s for name, s in run.items() if (i, name) in wanted}, points)
        for i, run in enumerate(runs)
    ]
    plots = [
        {
            "log": found.logarithmic,
            "lines": [{"run": line.run, "name": line.name} for line in found.lines],
        }
        for found in charts
    ]
    text = json.dumps({"runs": data, "charts": plots}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(series: Mapping[str, Series], points: int) -> dict[str, object]:
    """Series with each distinct axis of steps once."""
    axes: dict[bytes, int] = {}
    steps: list[list[int]] = []
    values: dict[str, tuple[int, list[float | None]]] = {}
    for name, found in series.items():
        few = envelope(found, points)
        key = few.step_N.tobytes()
        if key not in axes:
            axes[key] = len(steps)
            steps.append(few.step_N.tolist())
        values[name] = axes[key], list(short(few.value_N))
    return {"steps": steps, "series": values}


def short(value_N: NDArray[np.float64]) -> Iterator[float | None]:
    """Values at four digits, None for NaN."""
    for value in value_N.tolist():
        yield None if math.isnan(value) else float(f"{value:.4g}")
