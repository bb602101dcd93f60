"""The images that a run could not read and replaced: their names, for events.jsonl and trackers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from unic_ds import dist
from unic_ds.data import Stream
from unic_ds.files.printable import printable
from unic_ds.training import events
from unic_ds.training.run_log import RunLog

PER_RANK, LISTED = 20, 1000
"""Images that a rank names at a log line, and that a start names in all."""


@dataclass
class UnreadableImages:
    """The unreadable images of one start; every rank has them, and calls `record` together.

    A roll-back does not name them again.
    """

    out: Path
    """The run folder."""
    stream: Stream
    count: int = 0
    """Number at the last log line, of all ranks together."""
    unnamed: bool = False
    """True if a rank has more images than it could name at the last log line."""
    reasons: dict[str, str] = field(default_factory=dict)
    """By the name of each image that was named."""

    def record(self, log: RunLog) -> None:
        """Write the event `unreadable`, with the names, if the last log line has new ones.

        Ranks may read the same image, which is named once. No host read, nor a collective unless
        images are left to name: the number is the log's, the same on every rank.
        """
        count, step = log.last["bad_images"], log.last["step"]
        if (count <= self.count and not self.unnamed) or len(self.reasons) >= LISTED:
            return
        self.count = count
        mine = {printable(name): printable(why) for name, why in self.stream.bad}
        unnamed = {name: why for name, why in mine.items() if name not in self.reasons}
        found: dict[str, str] = {}
        parts = dist.all_gather_objects((dict(islice(unnamed.items(), PER_RANK)), len(unnamed)))
        for part, _ in parts:
            found |= part
        self.unnamed = any(left > len(part) for part, left in parts)
        new = {name: why for name, why in found.items() if name not in self.reasons}
        self.reasons |= new
        if not new:
            return
        images = [{"name": name, "reason": why} for name, why in new.items()]
        events.note(self.out, "unreadable", step=step, count=count, images=images)
        lines = [f"- {name}: {why}" for name, why in new.items()]
        log.text("unreadable images", "\n".join(lines), step=step)
