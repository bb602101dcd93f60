"""The first hour on a GPU: every check that waits for one, within ten minutes, and one table.

    python tests/first_hour/first_hour.py                        all checks; writes runs/first_hour/
    python tests/first_hour/first_hour.py --only peaks,training  these checks
    python tests/first_hour/first_hour.py --out DIR --json FILE  other places

It needs torch, Triton, numpy and timm; a check that needs more is skipped with the reason where
that is missing. Without a GPU it runs what a CPU can, and names what waits. A check that fails does
not stop the others. Exit code 1 if one failed. docs/gpu.md explains the table.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import first_hour_checks as checks  # noqa: E402
import first_hour_commands as commands  # noqa: E402
import first_hour_report as report  # noqa: E402
from first_hour_attempt import Attempt, Found, Session, Skip, last_json  # noqa: E402
from first_hour_checks import Check  # noqa: E402
from first_hour_commands import Clock, Failed, Late  # noqa: E402
from first_hour_report import Row  # noqa: E402

from unic_ds.files.printable import printable  # noqa: E402

MINUTES = 10.0
LEAST_S = 5.0
"""A check is not begun in less."""


def options() -> argparse.ArgumentParser:
    """The command line."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "runs" / "first_hour", help="folder that is written")
    add("--only", type=chosen, help="checks to run, joined by commas; an unknown one lists all")
    add("--json", type=Path, metavar="FILE", help="write first_hour.json here too")
    add(
        "--minutes",
        type=minutes,
        default=MINUTES,
        help="time of all checks [10]; with more, each has more",
    )
    return parser


def chosen(text: str) -> list[str]:
    """Names of checks."""
    known, names = [check.name for check in checks.all_checks()], text.split(",")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(
                f"there is no check {name!r}{meant} There are {', '.join(known)}"
            )
    return names


def minutes(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e4:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return value


def facts(out: Path) -> dict[str, Any]:
    """The machine, as another process sees it; SystemExit where it cannot say."""
    words = [sys.executable, str(ROOT / "tests" / "first_hour" / "first_hour_parts.py"), "machine"]
    log = out / "machine.txt"
    log.unlink(missing_ok=True)
    try:
        code, output = commands.run(words, log, limit=120, env=commands.environment(gpu=True))
        found = last_json(output)
    except Failed as error:
        sys.exit(f"this machine cannot be described: {printable(error)}; see {log}")
    assert code == 0
    log.unlink()
    return dict(found)


def hinder(check: Check, session: Session) -> Row | None:
    """The row of a check that cannot be begun; None for one that can."""
    lost = [name for name in check.files if not (ROOT / name).is_file()]
    missing = [name for name in check.needs if name in session.machine["missing"]]
    if lost:
        return Row(check=check.name, result=report.FAILED, reason=f"{lost[0]} is missing")
    if missing:
        reason = f"{', '.join(missing)} is not installed"
        return Row(check=check.name, result=report.SKIPPED, reason=reason)
    if check.gpu and not session.gpus:
        return Row(check=check.name, result=report.WAITS)
    if session.clock.left < LEAST_S:
        return Row(check=check.name, result=report.LATE, reason=session.over)
    return None


def carry_out(check: Check, session: Session) -> Row:
    """The row of a check that is run; whatever it raises is its row's reason."""
    limit = check.limit * max(1.0, session.minutes / MINUTES)
    attempt, begun = Attempt(session, check.name, limit), time.monotonic()
    result, reason, found = report.PASSED, "", Found()
    try:
        found = check.run(attempt)
    except Late as error:
        over = session.clock.left < LEAST_S
        result, reason = (report.LATE, session.over) if over else (report.FAILED, str(error))
    except Skip as error:
        result, reason = report.SKIPPED, str(error)
    except Failed as error:
        result, reason = report.FAILED, str(error)
    except Exception as error:  # an output that is not what the check expects
        result, reason = report.FAILED, f"{type(error).__name__}: {error}"
    finally:
        attempt.forget()
    return Row(
        check=check.name,
        result=result,
        seconds=time.monotonic() - begun,
        figure=found.figure,
        expected=found.expected,
        reason=printable(reason),
        commands=attempt.commands,
        data=found.data or {},
        tail=report.tail_of(attempt.output),
    )


def run(wanted: Sequence[Check], session: Session) -> list[Row]:
    """Rows of all checks, also of those that an interrupt leaves out; written after each."""
    rows: list[Row] = []
    for number, check in enumerate(wanted, 1):
        row = hinder(check, session)
        if row is None:
            print(f"[{number}/{len(wanted)}] {check.name} ...", end=" ", flush=True)
            try:
                row = carry_out(check, session)
            except KeyboardInterrupt:
                left = wanted[number - 1 :]
                reason = "interrupted"
                rows += [Row(check=c.name, result=report.LATE, reason=reason) for c in left]
                print("interrupted")
                break
            text = row.figure or row.reason
            print(printable(f"{row.result}, {row.seconds:.0f} s  {text}"), flush=True)
        rows.append(row)
        report.write(rows, session.machine, [], session.out)
    return rows


def notes_of(session: Session) -> list[str]:
    """Sentences below the table."""
    values = checks.efficiency(session)
    if not values:
        return []
    return [f"The measurements suggest: unic-ds plan --efficiency {values}"]


def interrupted(number: int, frame: FrameType | None) -> None:
    """End on SIGTERM as on an interrupt, so that no command outlives this one."""
    raise KeyboardInterrupt


def main() -> int:
    """The exit code: 1 if a check failed, 130 after an interrupt."""
    given = options().parse_args()
    signal.signal(signal.SIGTERM, interrupted)
    begun, out = time.monotonic(), given.out.absolute()
    try:
        (out / "work").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {printable(out)} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    clock = Clock(begun + 60 * given.minutes)
    session = Session(machine=facts(out), out=out, clock=clock, minutes=given.minutes)
    every = checks.all_checks()
    wanted = [check for check in every if given.only is None or check.name in given.only]
    rows = run(wanted, session)
    shutil.rmtree(out / "work", ignore_errors=True)
    notes = notes_of(session)
    report.write(rows, session.machine, notes, out)
    if given.json:
        given.json.write_text((out / "first_hour.json").read_text())
    report.show(rows, session.machine, notes)
    print(f"written to {printable(out)} in {time.monotonic() - begun:.0f} s")
    if any(row.reason == "interrupted" for row in rows):
        return 130
    return 1 if any(row.result == report.FAILED for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
