"""Entry point of a program: run its main function, report its failure, exit with its code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from opcode import opmap
from pathlib import Path
from typing import NoReturn, TextIO

from unic_ds.files.printable import printable
from unic_ds.process import console, interrupt, streams

PACKAGE = Path(__file__).parent.parent
RAISE = opmap["RAISE_VARARGS"]
REPORTS = "unic_ds_reports"  # attribute of an exception: True on the rank that reports it
LONGEST = 4000
"""Characters that are printed of a line of an error."""
WAIT_S = 10.0
"""Seconds that ranks which do not report an error wait to be ended by their launcher."""


def start(main: Callable[[Sequence[str]], int], argv: Sequence[str], *, trains: bool) -> NoReturn:
    """Run a program and end the process with its exit code; the last statement of a script.

    If standard output cannot be written, a program that `trains` warns once and continues. Any
    other program exits with 1 at its end, since its output is its result, unless the reader of a
    pipe has closed it.
    """

    def output_lost(error: OSError) -> None:
        if trains and console.first_rank():
            write(
                f"unic_ds: standard output cannot be written ({error.strerror}); the run goes on,"
                " and log.jsonl in its folder has the log"
            )

    out = streams.protect(output_lost)
    code = run(main, argv)
    sys.stdout.flush()
    if out.error and not (code or trains or out.error.errno in (errno.EPIPE, errno.EBADF)):
        write(f"unic_ds: error: standard output cannot be written ({out.error.strerror})")
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    A failed rank of several exits at once: Python's own exit would wait for NCCL's groups, which
    cannot be destroyed while the other ranks wait inside a collective.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run `main(argv)` and report its exception, if any; the exit code.

    A user's mistake is one sentence and 2, a foreseen failure one sentence and 1, any other
    exception its traceback and 1, an interruption one line and 128 + the signal. sys.excepthook
    stays as it is: torch replaces it by one that loses what a process prints last.
    """
    try:
        if not {"--help", "-h"} & set(argv):
            from unic_ds.process import requirements  # 20 ms; --help does not need it

            requirements.check()
        return main(argv)
    except BaseException as error:
        return report(error)


def report(error: BaseException) -> int:
    """Report the exception that ends a program, once per job; the exit code.

    Under a launcher every rank may raise the same: one rank reports it, rank 0 unless
    `choose_reporter` has decided otherwise, and the others wait to be ended by the launcher.
    """
    interrupt.reported.set()
    cause = interrupt.cause(error)
    code, text = exit_message(cause)
    if is_reporter(error):
        interrupt.ignore()  # the launcher may end this rank for the failure of another
        write(text)
        return code
    if isinstance(cause, KeyboardInterrupt):
        return code  # every rank gets the signal, and rank 0 reports it
    interrupt.restore_default()
    time.sleep(WAIT_S)  # the first exit ends the job, so the reporting rank must exit first
    if is_expected(cause) or REPORTS in vars(error):
        text = f"unic_ds: rank {os.environ['RANK']}: {summary(cause)}"
    write(text)
    return code


def exit_message(error: BaseException) -> tuple[int, str]:
    """(exit code, text) of an exception that ends a program."""
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        return 128 + number, f"unic_ds: {error if str(error) else 'ended by SIGINT'}"
    if is_expected(error):
        return 2 if isinstance(error, ValueError) else 1, f"unic_ds: error: {error}"
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    return code or 1, "".join(traceback.format_exception(error)).rstrip("\n")


def summary(error: BaseException) -> str:
    """An exception as one printable line."""
    if is_expected(error) or isinstance(error, interrupt.Interrupted):
        return printable(error)
    return printable(" ".join("".join(traceback.format_exception_only(error)).split()))


def is_expected(error: BaseException) -> bool:
    """True if this package raised the exception, as a message to the user.

    A RuntimeError that C code raised below a line of the package is torch's, and needs a traceback.
    """
    if not isinstance(error, ValueError | OSError | RuntimeError) or not error.__traceback__:
        return False
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    if not Path(code.co_filename).is_relative_to(PACKAGE):
        return False
    return not isinstance(error, RuntimeError) or code.co_code[last.tb_lasti] == RAISE


@contextmanager
def warnings_held() -> Iterator[None]:
    """Context manager that delays warnings and log lines of libraries until its end.

    They are dropped if the body raises a user's mistake, whose message has the same cause.
    """
    held: list[str] = []
    show, last = warnings.showwarning, logging.lastResort

    def hold(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        held.append(warnings.formatwarning(message, category, filename, lineno).rstrip("\n"))

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: held.append(handler.format(record))  # type: ignore[method-assign]
    warnings.showwarning, logging.lastResort = hold, handler
    try:
        yield
    except ValueError as error:
        if is_expected(error):
            held.clear()
        raise
    finally:
        warnings.showwarning, logging.lastResort = show, last
        for text in held:
            write(text)


def choose_reporter(error: BaseException, *, reports: bool) -> None:
    """Let this rank report an exception in full only if `reports`; the ranks have agreed on it."""
    vars(error)[REPORTS] = reports


def is_reporter(error: BaseException) -> bool:
    """True on the rank that reports an exception in full."""
    return vars(error).get(REPORTS, console.first_rank())


def write(text: str) -> None:
    """Print lines on stderr in one write; control characters except line breaks are escaped."""
    lines = [printable(line, LONGEST) for line in text.split("\n")]
    with suppress(OSError):
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
