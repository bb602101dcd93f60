"""`unic-ds doctor`: checks a node before a run, or a run folder after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unic_ds.cli import tables
from unic_ds.config import ds_config
from unic_ds.config.option import option
from unic_ds.config.verb import Call, Verb
from unic_ds.process import console

if TYPE_CHECKING:
    from unic_ds.doctor.preflight import CheckResult


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to a recipe's."""

    ds_config: str = option("ds_configs/zero2.json", "DeepSpeed configuration")
    out: str = option("runs", "folder that the run would write to")
    json: bool = option(False, "print one JSON object")
    hash: bool = option(
        False, "with RUN: read its checkpoints completely and compare their SHA-256"
    )


RUN_OPTIONS = ("hash", "json")
"""Options that go with RUN."""

VERB = Verb(
    name="doctor",
    summary="check this node (under a launcher: all nodes) before a run; with RUN, report the state"
    " of a run and what to do",
    options=Options,
    arguments={"[RUN]": "run folder to examine; only --hash and --json go with it"},
    takes="recipe",
    exit_codes={1: "a run would fail here; with RUN, something went wrong in it"},
)


def run(argv: Sequence[str]) -> int:
    """Check a node, or examine a run folder; return the exit code."""
    call = VERB.read(argv)
    if not call.arguments:
        if call.options.hash:
            raise ValueError("--hash goes with RUN, the folder of a run; give one")
        return check_node(call)
    VERB.check_options(call.given, known=RUN_OPTIONS)
    from unic_ds.doctor import postmortem

    folder, options = Path(call.arguments[0]), call.options
    return postmortem.run(folder, hashes=options.hash, as_json=options.json)


def check_node(call: Call[Options]) -> int:
    """Print the results of the nodes' checks; return 1 if a run would fail."""
    cfg, options = call.config(), call.options
    file = ds_config.read(options.ds_config)
    from unic_ds.doctor import preflight

    results = preflight.check(preflight.IntendedRun(cfg=cfg, file=file, out=Path(options.out)))
    fails = any(result.state == preflight.FAILS for result in results)
    if console.first_rank():
        show(results, fails=fails, as_json=options.json)
    return 1 if fails else 0


def show(results: Sequence[CheckResult], *, fails: bool, as_json: bool) -> None:
    """Print results as a table for people or one JSON object for programs."""
    if as_json:
        print(json.dumps({"fails": fails, "checks": [asdict(result) for result in results]}))
        return
    several = len({result.host for result in results}) > 1
    rows = [(r.host, r.check, r.state, r.result, r.remedy)[not several :] for r in results]
    tables.show_table(rows, header=("node", "check", "", "result", "remedy")[not several :])
