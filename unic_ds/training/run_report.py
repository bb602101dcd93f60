"""The page OUT/report.html of a run in training: a web server over the folder is a dashboard."""

from __future__ import annotations

from pathlib import Path

from unic_ds.files import run_files
from unic_ds.process import console
from unic_ds.report import page, run_record
from unic_ds.report.run_record import GrowingLog
from unic_ds.training.side_action import SideAction


class RunReport:
    """The page of a run folder, or of a stage's and of its run's; rank 0 writes it."""

    def __init__(self, out: Path):
        self.out = out
        self.log = GrowingLog(out / run_files.LOG)
        self.written = SideAction(
            self.write_files,
            name="report",
            instead=f"`unic-ds report {out}` writes it later",
        )

    def write(self, *, last: bool = False) -> None:
        """Write the page if it is due; the `last` at any rate, whose name is printed."""
        if self.written.run(last=last) and last:
            console.say(f"report: {self.out / page.FILE}")

    def write_files(self) -> None:
        """Write the page. While a stage trains it is also that of the run, in the folder above."""
        text = page.render([run_record.read(self.out, self.log)])
        for folder in (self.out, *run_record.run_of_stage(self.out)):
            page.write_text(text, folder / page.FILE)
