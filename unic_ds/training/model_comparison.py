"""The work of `unic-ds eval`: evaluate models, print their table, write it to a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from unic_ds import dist
from unic_ds.config import Config, eval_spec
from unic_ds.evaluate import table
from unic_ds.evaluate.registry import EVALUATORS
from unic_ds.harness import session
from unic_ds.training import student_folder

TIMEOUT_S = 4 * 3600
"""Longest wait of a rank for another, which may train heads on its own share."""


def compare(
    tasks: str, specs: Sequence[str], cfg: Config, *, out: Path | None, as_json: bool
) -> None:
    """Evaluate models by comma-separated tasks, and print a table or JSON on rank 0.

    `out` gets `evaluation.json`, `results.json` and `results.png`. Errors as `session.evaluate`.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        names = eval_spec.tasks(tasks, tuple(EVALUATORS))
        dist.start(TIMEOUT_S)
        found = session.evaluate(names, specs, cfg, export=student_folder.from_checkpoint)
    if dist.rank() != 0:
        return
    if out:
        out.mkdir(parents=True, exist_ok=True)
        table.plot(found, [], out / "results.png", title=out.name)
        found.write(out)
    if as_json:
        print(json.dumps(found.plain()))
    else:
        table.print_to_terminal(found)
