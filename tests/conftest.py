"""Fixtures and options that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import FINISHED, PARTIAL, alone, launched, run

from unic_ds import demo

pytest.register_assert_rewrite("image_losses_accuracy", "moments_accuracy")

FAULT = "fault"
HEAD = "| fault | what the run does | proven |", "|---|---|---|"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file to write the table of faults to."""
    parser.addoption("--faults-table", type=Path, help="write the table of faults to this file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; let reports carry the fault that is injected."""
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
    reports = [r for result in results for r in terminalreporter.stats.get(result, [])]
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
def finished(demonstration, tmp_path_factory):
    """A finished run of two ranks under the launcher, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run#1,a"
    return out, run(launched(out, **FINISHED))


@pytest.fixture(scope="session")
def stopped(demonstration, tmp_path_factory):
    """A run that stopped after 4 of 6 steps, with checkpoints at 2 and 4."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    run(alone(out, **PARTIAL, run__stop_at=4))
    return out
