"""Fixtures and options that all tests share."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from composed_sets import compose
from runs import FINISHED, PARTIAL, alone, launched, run

from unic_ds import demo

pytest.register_assert_rewrite("image_losses_accuracy", "moments_accuracy")

# Unbuffered, print writes its arguments one by one, and lines of several ranks would mix.
os.environ.pop("PYTHONUNBUFFERED", None)

LONG = (
    "test_long",
    "test_estimate",
    "test_same_answer",
    "test_blocks",
    "test_partitioned",
    "test_ema",
    "test_checkpoints",
    "test_placement",
    "test_stop",
    "test_walkthrough",
    "test_first_hour",
    "test_train",
    "test_step_guard",
)
"""Files whose tests take minutes, the longest first."""

FAULT = "fault"
HEAD = "| fault | what the run does | proven |", "|---|---|---|"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file to write the table of faults to."""
    parser.addoption("--faults-table", type=Path, help="write the table of faults to this file")
    parser.addoption(
        "--start-until", type=float, help="skip tests that would start later (seconds since 1970)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that would start later than `--start-until`."""
    until = item.config.getoption("--start-until")
    if until is not None and time.time() > until:
        pytest.skip("its machine was too slow: there was no time left for this test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; let reports carry the fault that is injected.

    Files that take minutes come first, so that no process is left with one of them at the end.
    """
    items.sort(key=lambda item: (*LONG, item.path.stem).index(item.path.stem))
    for item in items:
        if mark := item.get_closest_marker("fault"):
            item.user_properties.append((FAULT, mark.args))
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if not needy:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the faults that were injected and what came of them, as a table."""
    results = ("passed", "failed", "error", "skipped")
    found = [r for result in results for r in terminalreporter.stats.get(result, [])]
    reports = [r for r in found if isinstance(r, pytest.TestReport)]  # none of a collection error
    rows: dict[str, tuple[str, str, str]] = {}
    for report in sorted(reports, key=lambda report: (report.location[0], report.start)):
        for name, value in report.user_properties:
            if name == FAULT:
                rows[report.nodeid] = (*value, report.outcome)
    if not rows:
        return
    held, skipped = (
        sum(row[2] == result for row in rows.values()) for result in ("passed", "skipped")
    )
    lines = [*HEAD, *(f"| {' | '.join(row)} |" for row in rows.values())]
    rest = f"; {skipped} were not injected here" if skipped else ""
    lines += ["", f"{held} of {len(rows)} faults end as they should{rest}."]
    terminalreporter.section("faults")
    for line in lines:
        terminalreporter.write_line(line)
    if file := terminalreporter.config.getoption("--faults-table"):
        file.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def demonstration():
    """The quickstart's teachers and images, made once."""
    if demo.missing_packages():
        pytest.skip("the quickstart's packages are not installed (make test does)")
    demo.prepare()


@pytest.fixture(scope="session")
def composed(tmp_path_factory):
    """Small data sets with exact annotations in published layouts, made once."""
    return compose(tmp_path_factory.mktemp("composed"))


@pytest.fixture(scope="session")
def finished(demonstration, tmp_path_factory, worker_id):
    """A finished run of two ranks under the launcher, and what it printed.

    The first process of tests makes it; another one gets a copy, which its tests may change.
    """
    out = tmp_path_factory.mktemp("finished") / "run#1,a"
    if worker_id == "master":
        return out, run(launched(out, **FINISHED))
    first = tmp_path_factory.getbasetemp().parent / "finished"
    with first.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if first.is_dir():
            shutil.copytree(first / "run", out)
            made_in, printed = json.loads((first / "printed.json").read_text())
            return out, printed.replace(made_in, str(out))
        printed = run(launched(out, **FINISHED))
        with tempfile.TemporaryDirectory(dir=first.parent) as scratch:
            made = Path(scratch) / "made"
            shutil.copytree(out, made / "run")
            (made / "printed.json").write_text(json.dumps([str(out), printed]))
            made.rename(first)
    return out, printed


@pytest.fixture(scope="session")
def stopped(demonstration, tmp_path_factory):
    """A run that stopped after 4 of 6 steps, with checkpoints at 2 and 4."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    run(alone(out, **PARTIAL, run__stop_at=4))
    return out
