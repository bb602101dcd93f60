"""The events of a run in words, and those that stand out."""

from __future__ import annotations

from collections.abc import Mapping

from unic_ds.report.run_record import Event

HUNG = ("rank lost", "rank silent", "no progress")
"""Events by which the watchdog ends a run."""

KINDS = {
    "bad": ("failed", "refused", "stopped", *HUNG),
    "warn": ("skipped", "rolled back", "warning", "tracker failed", "unreadable"),
}
"""Classes of events that stand out."""

REASONS = {"loss": "loss not finite", "gradient": "gradient not finite", "spike": "loss spike"}
"""Of skipped steps."""

NAMES = 4
"""Names of samples or images that an event shows."""

FACTS, DEPTH = 8, 3
"""Parts of a list or an object that are shown, and how deep it may be."""


def kind_of(event: Event) -> str:
    """Class of an event, "" for one that does not stand out."""
    return next((kind for kind, names in KINDS.items() if event.name in names), "")


def text_of(event: Event) -> str:
    """The facts of an event as a line: for people, not escaped."""
    facts = dict(event.facts)
    if event.name == "skipped":
        why = plain(facts.get("why"))
        return f"{REASONS.get(why, why)}; {samples_text(facts.get('samples'))}"
    if event.name == "rolled back":
        span = facts.get("left_out")
        left_out = " to ".join(map(plain, span)) if isinstance(span, list) else plain(span)
        return f"to step {plain(facts.get('to'))}; data of steps {left_out} are left out"
    if event.name == "resumed":
        return f"after step {event.step}, on {plain(facts.get('ranks'))} rank(s)"
    if event.name == "extended":
        return f"from {plain(facts.get('of'))} to {plain(facts.get('to'))} steps"
    if event.name == "unreadable":
        return images_text(facts.get("images"))
    keys = ("message", "error", "says", "remedy")
    says = [plain(facts.pop(key)) for key in keys if key in facts]
    rest = [f"{key} {plain(value)}" for key, value in facts.items() if value not in ("", None, [])]
    return "; ".join([*says, *rest])


def samples_text(samples: object) -> str:
    """The first samples of a skipped step, and how many more there are."""
    if not isinstance(samples, Mapping):
        return "samples unknown"
    names = [plain(name) for of in samples.values() if isinstance(of, list) for name in of]
    return f"samples {listed(names)}"


def images_text(images: object) -> str:
    """The first unreadable images with their reasons, and how many more there are."""
    if not isinstance(images, list):
        return "images unknown"
    rows = [row if isinstance(row, Mapping) else {"name": row} for row in images]
    names = [f"{plain(row.get('name'))} ({plain(row.get('reason'))})" for row in rows]
    return f"{len(names)} {'image' if len(names) == 1 else 'images'}: {listed(names)}"


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more


def plain(value: object, depth: int = DEPTH) -> str:
    """A value of JSON without its brackets and quotes; what is long or deep is cut."""
    if isinstance(value, Mapping | list):
        if not depth:
            return "..."
        parts = (
            [f"{key} {plain(part, depth - 1)}" for key, part in list(value.items())[:FACTS]]
            if isinstance(value, Mapping)
            else [plain(part, depth - 1) for part in value[:FACTS]]
        )
        between = " " if isinstance(value, Mapping) else ", "
        return between.join([*parts, *(["..."] if len(value) > FACTS else [])])
    return str(value)
