"""Work beside the training that may fail without ending it: pictures, checks, a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from unic_ds import dist
from unic_ds.files.printable import printable
from unic_ds.process import console, entry_point


@dataclass
class Attempts:
    """Calls of functions whose exceptions are printed, the first of them, and end nothing."""

    failed: str
    """The beginning of the line, which rank 0 prints: what is missing then."""
    instead: str = ""
    """The end of the line: what to do then."""
    noted: bool = False

    def here(self, work: Callable[[], object]) -> bool:
        """Call a function on rank 0 alone; False there if it fails."""
        if dist.rank() == 0:
            try:
                work()
            except Exception as error:  # whatever it is: other ranks wait for this one
                self.note(entry_point.summary(error))
                return False
        return True

    def on_all_ranks(self, work: Callable[[], object]) -> bool:
        """Call a function on every rank; False on all if it fails on one."""
        problem = ""
        try:
            work()
        except Exception as error:
            problem = entry_point.summary(error) or type(error).__name__
        problems = [text for text in dist.all_gather_objects(problem) if text]
        for text in problems[:1]:
            self.note(text)
        return not problems

    def note(self, problem: str) -> None:
        """Print once that something is missing, and why."""
        if not self.noted:
            self.noted = True
            console.say(f"{self.failed}: {printable(problem)}{self.instead}")
