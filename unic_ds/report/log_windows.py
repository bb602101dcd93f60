"""Windows of a log's series: recent values, medians that hold, means before and after a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from unic_ds.report.run_record import Series

RECENT = 1000
"""Log lines that checks look back over; older trouble is in the curves and events."""

LINES = 20
"""Lines whose median counts: single slow lines (a save, a busy file system) are no finding."""

FEWEST = 5
"""Fewest values of a mean that is compared."""

SHARES = {"loss_share": "kept loss", "weight": "weight in the loss"}
"""Logged values of each teacher -> what its share of their sum is a share of; the better first.

Runs of older versions have logged no `loss_share`.
"""


def teacher_shares(
    series: Mapping[str, Series], *, newest: int | None = None
) -> tuple[str, dict[str, Series]]:
    """(key of `SHARES`, each teacher's share); ("", {}) unless several teachers have logged one.

    Of the `newest` log lines only, if given.
    """
    lines = slice(-newest if newest else None, None)
    for key in SHARES:
        names = [name for name in series if name.endswith(f"/{key}")]
        steps = [series[name].step_N[lines] for name in names]
        if len(names) < 2 or not all(np.array_equal(steps[0], step_N) for step_N in steps):
            continue
        value_TN = np.stack([series[name].value_N[lines] for name in names])
        with np.errstate(all="ignore"):  # a log may hold any number
            total_N = value_TN.sum(0)
            share_TN = value_TN / np.where(total_N > 0, total_N, np.nan)
        pairs = zip(names, share_TN, strict=True)
        return key, {n.removesuffix(f"/{key}"): Series(steps[0], share_N) for n, share_N in pairs}
    return "", {}


def finite(series: Series | None, most: int | None = None) -> Series | None:
    """The finite values of a series, the `most` newest; None if there are none."""
    if series is None:
        return None
    newest = slice(-most if most else None, None)
    step_N, value_N = series.step_N[newest], series.value_N[newest]
    finite_N = np.isfinite(value_N)
    return Series(step_N[finite_N], value_N[finite_N]) if finite_N.any() else None


def sustained(
    series: Series | None, condition: Callable[[NDArray[np.float64]], NDArray[np.bool_]]
) -> tuple[float, int] | None:
    """(median of the last `LINES`, step since which the median fulfils a condition); or None.

    A median over a window changes when half of the window has.
    """
    newest = finite(series, RECENT)
    if newest is None or len(newest.value_N) < LINES:
        return None
    median_N = np.median(sliding_window_view(newest.value_N, LINES), 1)
    fails_N = np.flatnonzero(~condition(median_N))
    if not len(fails_N):
        return float(median_N[-1]), int(newest.step_N[0])
    first = int(fails_N[-1]) + 1
    if first == len(median_N):
        return None
    return float(median_N[-1]), int(newest.step_N[first + LINES // 2])


def gain_of(series: Series, last: int, horizon: int) -> float:
    """Mean of the last `horizon` steps minus that of those before; infinite with too few values."""
    lines = [between(series, last - n * horizon, last - (n - 1) * horizon) for n in (1, 2)]
    if min(map(len, lines)) < FEWEST:
        return np.inf
    return float(lines[0].mean() - lines[1].mean())


def mean_between(series: Series, after: int, until: int) -> float:
    """Mean of the finite values of steps in (after, until]; 0 without any."""
    found_N = between(series, after, until)
    return float(found_N.mean()) if len(found_N) else 0.0


def between(series: Series, after: int, until: int) -> NDArray[np.float64]:
    """Finite values of steps in (after, until]."""
    first, end = np.searchsorted(series.step_N, (after, until), side="right")
    value_N = series.value_N[first:end]
    return value_N[np.isfinite(value_N)]
