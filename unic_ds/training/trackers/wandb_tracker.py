"""Weights & Biases: settings and metrics, nothing of the code, the machine or the console.

Online or offline (WANDB_MODE=offline: files in RUN/wandb, for `wandb sync`). A record cannot be
rewritten, so steps that it has of an earlier start are not sent again.
"""

from __future__ import annotations

import html
import os
import secrets
import sys
from collections.abc import Mapping

import numpy as np
import wandb
from numpy.typing import NDArray

from unic_ds.config import overrides
from unic_ds.training.trackers.groups import group_of
from unic_ds.training.trackers.record_ids import SentSteps, read_ids, read_steps
from unic_ds.training.trackers.tracker import End, Row, Start

SERVICE = "wandb"
BINS = 20


class Wandb:
    """A run of W&B, which one with the same id in trackers.json goes on with."""

    def __init__(self, start: Start):
        known = read_ids(start.folder).get(SERVICE)
        record = known or secrets.token_hex(8)
        hooks = sys.exit, sys.excepthook
        try:
            check_login()
            self.run = open_run(start, record)
        finally:
            sys.exit, sys.excepthook = hooks  # the run reports its end itself
        stored = read_steps(start.folder).get(SERVICE, 0) if known else 0
        self.logged = max(stored, self.run.starting_step - 1)  # W&B's is 0 without a network
        self.sent = SentSteps(start.folder, SERVICE, record=record, last=self.logged)

    def scalars(self, row: Row, *, step: int) -> None:
        """Add the known values, in their groups."""
        values = {group_of(name): value for name, value in row.items() if value is not None}
        self.add(values, step, commit=True)
        self.sent.add(step)

    def histogram(self, name: str, value_N: NDArray[np.floating], *, step: int) -> None:
        """Add a histogram."""
        counts = np.histogram(value_N, bins=BINS)
        self.add({group_of(name): wandb.Histogram(np_histogram=counts)}, step)

    def picture(self, name: str, image_HW3: NDArray[np.uint8], *, caption: str, step: int) -> None:
        """Add an image, also of the last step, which a later start draws."""
        self.send({name: wandb.Image(image_HW3, caption=caption)}, step)

    def text(self, name: str, text: str, *, step: int) -> None:
        """Add a text, as a page."""
        self.send({name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)}, step)

    def add(self, values: Mapping[str, object], step: int, *, commit: bool = False) -> None:
        """Add values of a step that the record does not have of an earlier start."""
        if step > self.logged:
            self.send(values, step, commit=commit)

    def send(self, values: Mapping[str, object], step: int, *, commit: bool = False) -> None:
        """Add values to the row of a step; what follows its log line comes to the next row."""
        at = step if commit else max(step, self.run.step)
        self.run.log(dict(values), step=at, commit=commit)

    def close(self, end: End) -> None:
        """Finish the run; a later start goes on with it. W&B has no state of one that stopped."""
        self.sent.store()
        self.run.finish(exit_code=int(end == "failed"))


def check_login() -> None:
    """ValueError if the service would ask for a key on the terminal."""
    mode = wandb.setup().settings.mode
    if mode not in ("offline", "dryrun", "disabled") and not wandb.login(
        prompt=False, verify=False
    ):
        raise ValueError("there is no API key on this machine")


def open_run(start: Start, record: str) -> wandb.Run:
    """Start or resume the run with the id `record`; its files are in the run folder."""
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "unic_ds"),
        name=os.environ.get("WANDB_NAME", start.name),
        id=record,
        resume="allow",
        dir=os.environ.get("WANDB_DIR", str(start.folder)),
        config=overrides.to_dict(start.cfg),
        allow_val_change=True,
        settings=wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            reinit="create_new",
            save_code=False,
            silent=True,
            symlink=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,
        ),
    )


open_tracker = Wandb
