"""Numbers in words."""

from __future__ import annotations


def times(count: int) -> str:
    """`once` or `N times`."""
    return "once" if count == 1 else f"{count:,} times"


def duration(seconds: float) -> str:
    """Seconds as people say them: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if seconds < 120:
        return f"{max(0, seconds):.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24:,} d {hours % 24} h"
