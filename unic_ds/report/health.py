"""Findings about a run in words: value, since which step, and what to try.

Each check looks at the newest state, by N log lines or steps whose number and threshold are
constants below, with their reasons. All is computed from a record; nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from unic_ds.files.printable import printable
from unic_ds.report.log_windows import (
    LINES,
    RECENT,
    SHARES,
    between,
    finite,
    gain_of,
    mean_between,
    sustained,
    teacher_shares,
)
from unic_ds.report.run_record import RunRecord, number_of
from unic_ds.report.wording import duration, times

MOST_WAIT = 0.2
"""Share of the time; a GPU that idles a fifth of it costs a day of a five-day run."""

LEAST_OF_PLAN = 0.5
"""Share of the planned MFU; the plan itself is within a factor of two where it was measured."""

DOMINANT = 0.8
"""Share of one teacher. Dropping at its rate of 0.5 gives the hardest of two at most 0.67."""

NO_PROGRESS, PART_OF_RUN, LEAST_RATE = 1000, 10, 0.1
"""Steps over which a teacher must improve: `NO_PROGRESS`, and of a long run one `PART_OF_RUN`th.

The longer a run has trained, the slower it improves. Nothing need improve while the learning rate
is below `LEAST_RATE` of its peak: at the start of the warm-up and at the end of the cosine.
"""

SPIKE, WINDOW = 10.0, 32
"""Robust z-score of a spike, as `--run.spike` suggests, and the lines before that it compares."""

COLLAPSE, PROBES = 0.75, 3
"""Share of the highest RankMe so far, and fewest probes: it varies by some % between probes."""

TRIAL = 20
"""Steps below which a run only tries whether it starts: its learning rate does not matter."""

MOST_SKIPPED, FEW_SKIPPED = 0.01, 3
"""Share of skipped steps, and their number, which are often; a run may skip a bad batch."""

OFTEN = 2
"""Roll-backs; a second one shows that the first did not remove the cause."""

STALLED, LEAST_STALL_S = 10, 120.0
"""Log intervals without a line, and seconds at least: a slow file system may hold a line back."""

STEP_PHASES = ("reading data", "teachers", "student", "backward", "end of step")
SLOW_PHASE_S = 2400.0
"""Phases of a step; any other may take as long as the watchdog gives it: 4 x 600 s."""


@dataclass(frozen=True)
class Finding:
    """One thing about a run that deserves attention."""

    kind: str
    """`stalled`, `loss spikes`, `data wait`, ..., the names of `CHECKS`."""
    message: str
    """A clause with the value, and since which step."""
    remedy: str
    """A clause with the options to try."""
    step: int
    """Since which step, or at which."""
    teacher: str = ""
    """The teacher that it is about, if any."""


def findings(record: RunRecord, *, now: datetime | None = None) -> list[Finding]:
    """The findings about a run's newest state, the worst kind first; `now` in UTC."""
    with np.errstate(all="ignore"):  # a log may hold any number
        found = [*stalled(record, now or datetime.now(UTC))]
        for check in CHECKS:
            found += check(record)
    return found


def stalled(record: RunRecord, now: datetime) -> Iterator[Finding]:
    """A run that should have logged long ago: it hangs, was killed, or was stopped."""
    last, steps = record.last_step, record.steps
    if record.finished or record.written is None or not last or (steps and last >= steps):
        return
    quiet, limit = (now - record.written).total_seconds(), stall_limit(record)
    if quiet < limit:
        return
    of = f"{last:,} of {steps:,}" if steps else f"{last:,}"
    message = f"no log line for {duration(quiet)}, since step {of}"
    if not record.heartbeats:
        remedy = "the run has ended; the same command goes on from its last checkpoint"
        yield Finding("stopped", message, remedy, last)
    elif now.timestamp() - progressed_at(record.heartbeats[0]) >= limit:
        first = record.heartbeats[0]
        rank, phase = printable(first.get("rank"), 9), printable(first.get("phase"), 40)
        name = printable(record.folder)
        message += f"; rank {rank} was last in phase '{phase}'"
        yield Finding(
            "stalled", message, f"`unic-ds doctor {name}` says whether it still runs", last
        )


def stall_limit(record: RunRecord) -> float:
    """Seconds without a log line or a change of phase after which a run is stalled."""
    limit = max(STALLED * log_interval(record), LEAST_STALL_S)
    phases = [beat.get("phase") for beat in record.heartbeats[:1]]
    slow = phases and phases[0] not in STEP_PHASES
    return max(limit, SLOW_PHASE_S) if slow else limit


def progressed_at(heartbeat: Mapping[str, object]) -> float:
    """Time (POSIX) at which a rank's phase last changed, by its clock; 0 if it is not known."""
    time, idle_s = (number_of(heartbeat.get(key)) for key in ("time", "idle_s"))
    if time is None or idle_s is None:
        return 0.0
    at = time - idle_s
    return at if np.isfinite(at) else 0.0


def log_interval(record: RunRecord) -> float:
    """Seconds between log lines by the rate of the last ones; 0 if they do not tell."""
    rate, samples = (record.series.get(name) for name in ("images_per_s", "samples"))
    if rate is None or samples is None or len(samples.value_N) < 2:
        return 0.0
    rates_N, images_N = rate.value_N[-LINES:], np.diff(samples.value_N[-LINES - 1 :])
    known_N = rates_N[np.isfinite(rates_N) & (rates_N > 0)]
    return float(np.median(images_N) / np.median(known_N)) if len(known_N) else 0.0


def loss_spikes(record: RunRecord) -> Iterator[Finding]:
    """Log lines whose loss is far above that of the lines before."""
    loss = finite(record.series.get("loss"), RECENT + WINDOW)
    if loss is None or len(loss.value_N) <= WINDOW:
        return
    before_NW = sliding_window_view(loss.value_N[:-1], WINDOW)
    median_N = np.median(before_NW, 1)
    deviation_N = 1.4826 * np.median(np.abs(before_NW - median_N[:, None]), 1)
    over_N = loss.value_N[WINDOW:] - median_N
    spike_N = over_N > SPIKE * (deviation_N + 1e-3 * np.abs(median_N))
    begins_N = np.flatnonzero(spike_N & ~np.r_[False, spike_N[:-1]])
    if not len(begins_N):
        return
    at, steps_N = int(begins_N[-1]), loss.step_N[WINDOW:][begins_N]
    message = (
        f"the loss spiked {times(len(begins_N))}, last at step {steps_N[-1]:,}:"
        f" {loss.value_N[WINDOW + at]:.4g}, against a median of {median_N[at]:.4g} before"
    )
    guard = "" if record.settings.run.spike else "`--run.spike 10` skips such steps; "
    remedy = f"{guard}lower `--optim.lr`, or set `--optim.clip`, if it goes on"
    yield Finding("loss spikes", message, remedy, int(steps_N[0]))


def skipped_steps(record: RunRecord) -> Iterator[Finding]:
    """Steps that were skipped often, since their loss or gradient was not usable."""
    skipped = finite(record.series.get("skipped"), RECENT)
    if skipped is None:
        return
    count = skipped.value_N.sum()
    steps = int(skipped.step_N[-1]) - int(skipped.step_N[0]) + 1
    if count < FEW_SKIPPED or count <= MOST_SKIPPED * steps:
        return
    first = int(skipped.step_N[np.flatnonzero(skipped.value_N)[0]])
    message = f"{count:,.0f} of the last {steps:,} steps were skipped, since step {first:,}"
    remedy = (
        "events.jsonl has reasons and samples: repair or remove these; or lower `--optim.lr`, or"
        " set `--optim.clip`"
    )
    yield Finding("skipped steps", message, remedy, first)


def roll_backs(record: RunRecord) -> Iterator[Finding]:
    """Several roll-backs to an earlier checkpoint."""
    events = [event for event in record.events if event.name == "rolled back"]
    if len(events) < OFTEN:
        return
    at, to = (printable(events[-1].facts.get(key), 12) for key in ("at", "to"))
    message = f"the run rolled back {times(len(events))}, last from step {at} to {to}"
    remedy = (
        f"lower `--optim.lr`, or set `--optim.clip`; {record.settings.run.max_rollbacks} end it"
    )
    step = events[-1].facts.get("at")
    yield Finding("roll-backs", message, remedy, step if type(step) is int else 0)


def collapse(record: RunRecord) -> Iterator[Finding]:
    """Features of the student whose effective rank falls."""
    rank = finite(record.series.get("probe/rankme"), RECENT)
    if rank is None or len(rank.value_N) < PROBES:
        return
    best = int(np.argmax(rank.value_N))
    if rank.value_N[-1] >= COLLAPSE * rank.value_N[best]:
        return
    since = int(rank.step_N[best + 1])
    message = (
        f"RankMe of the student fell from {rank.value_N[best]:.3g} to {rank.value_N[-1]:.3g} since"
        f" step {since:,}: its features collapse to fewer directions"
    )
    remedy = "lower `--optim.lr`, standardise (`--standardise.on true`), or look at the balance"
    yield Finding("features collapse", message, remedy, since)


def dominant_teacher(record: RunRecord) -> Iterator[Finding]:
    """A teacher that has most of the kept loss for itself."""
    key, shares = teacher_shares(record.series, newest=RECENT)
    for name, share in shares.items():
        if state := sustained(share, lambda value_N: value_N > DOMINANT):
            value, since = state
            shown = printable(name)
            message = f"teacher {shown} has {value:.0%} of the {SHARES[key]}, since step {since:,}"
            others = (
                "raise the others' `--teachers.NAME.weight`, lower `--drop.rate`, or try"
                " `--balance.kind adaloss`"
            )
            yield Finding("dominant teacher", message, others, since, name)


def stuck_teacher(record: RunRecord) -> Iterator[Finding]:
    """A teacher of which no measure has improved for many steps."""
    last = record.last_step
    horizon = max(NO_PROGRESS, last // PART_OF_RUN)
    rate = record.series.get("lr")
    if rate is None or last < 2 * horizon:
        return
    if mean_between(rate, last - horizon, last) < LEAST_RATE * record.settings.optim.peak:
        return
    for name in teacher_names(record):
        measures = [
            (series, -1 if key.endswith("_smooth_l1") else 1)
            for key, series in record.series.items()
            if key.startswith(f"{name}/") and key.endswith(("_cosine", "_smooth_l1"))
            if len(between(series, last - 2 * horizon, last))
        ]
        gains = [sign * gain_of(series, last, horizon) for series, sign in measures]
        if gains and all(gain <= 0 for gain in gains):
            shown, since = printable(name), last - horizon
            message = (
                f"teacher {shown} has not improved for {horizon:,} steps, since step {since:,}:"
                " neither cosine nor smooth-L1"
            )
            remedy = (
                f"raise `--teachers.{shown}.weight`, widen the ladder (`--ladder.width`), or check"
                " the teacher with `unic-ds teachers check`"
            )
            yield Finding("stuck teacher", message, remedy, since, name)


def learning_rate(record: RunRecord) -> Iterator[Finding]:
    """A warm-up that is as long as the run: the peak is reached at its end, if at all."""
    rate, steps, peak = record.series.get("lr"), record.steps, record.settings.optim.peak
    if rate is None or not steps or steps < TRIAL:
        return
    highest = int(np.argmax(rate.value_N))
    step, value = int(rate.step_N[highest]), float(rate.value_N[highest])
    if step < record.last_step or step == 1 or not value > 0:
        return
    warmup = 1 + (step - 1) * peak / value  # it rises linearly from 0, and is still rising
    if not warmup >= steps - 0.5:
        return
    message = (
        f"the warm-up takes all {steps:,} steps: the peak learning rate of {peak:.3g} comes in the"
        " last one, if at all"
    )
    remedy = "shorten `--optim.warmup_epochs`, or train longer (`--optim.epochs`)"
    yield Finding("learning rate", message, remedy, int(rate.step_N[0]))


def data_wait(record: RunRecord) -> Iterator[Finding]:
    """Training that waits for images."""
    state = sustained(record.series.get("data_wait_share"), lambda value_N: value_N > MOST_WAIT)
    if state:
        message = f"{state[0]:.0%} of the time is spent waiting for images, since step {state[1]:,}"
        remedy = (
            "more `--data.threads` or `--data.readers`, images packed small (`unic-ds pack"
            " --max_side`), a local disk, or `--data.backend dali` with a GPU"
        )
        yield Finding("data wait", message, remedy, state[1])


def mfu(record: RunRecord) -> Iterator[Finding]:
    """A speed far below the planner's, by start.json, which has it on a known GPU."""
    planned = record.start.get("planned_mfu")
    if not isinstance(planned, float) or not planned > 0:
        return
    limit = LEAST_OF_PLAN * planned
    if state := sustained(record.series.get("mfu"), lambda value_N: value_N < limit):
        message = f"MFU is {state[0]:.1%}, the plan says {planned:.1%}, since step {state[1]:,}"
        remedy = (
            "look at the data wait first, then `--run.compile all` and a larger micro batch;"
            " `unic-ds plan` shows what bounds a step"
        )
        yield Finding("MFU", message, remedy, state[1])


def unreadable_images(record: RunRecord) -> Iterator[Finding]:
    """Images that could not be read."""
    bad = finite(record.series.get("bad_images"))
    if bad is None or not bad.value_N[-1]:
        return
    count, since = bad.value_N[-1], int(bad.step_N[np.flatnonzero(bad.value_N)[0]])
    plural = "s" if count > 1 else ""
    message = f"{count:,.0f} image{plural} could not be read, since step {since:,}"
    limit = record.settings.data.bad_limit
    remedy = (
        "`unreadable` in events.jsonl names them and says why: repair or remove them; above"
        f" {limit:.0%} (`--data.bad_limit`) the run ends"
    )
    yield Finding("unreadable images", message, remedy, since)


CHECKS: tuple[Callable[[RunRecord], Iterator[Finding]], ...] = (
    loss_spikes,
    skipped_steps,
    roll_backs,
    collapse,
    dominant_teacher,
    stuck_teacher,
    learning_rate,
    data_wait,
    mfu,
    unreadable_images,
)
"""The checks of a log, the worst findings first."""


def teacher_names(record: RunRecord) -> list[str]:
    """The run's teachers."""
    return [teacher.name for teacher in record.settings.teachers]
