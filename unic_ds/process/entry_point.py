"""Start of a program: run its main function, print how it failed, leave with its exit code."""

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
from typing import Any, NoReturn

from unic_ds.files.printable import printable
from unic_ds.process import interrupt, streams

OWN = Path(__file__).parent.parent
RAISE = opmap["RAISE_VARARGS"]
SPEAKS = "unic_ds_speaks"
LONGEST = 4000
"""Characters of a line of an error that are printed."""
WAIT_S = 10.0
"""Seconds that ranks which do not report an error wait to be ended by their launcher."""


def start(main: Callable[[Sequence[str]], int], argv: Sequence[str], *, trains: bool) -> NoReturn:
    """Run a program and end the process with its exit code: what a script's last line calls.

    Standard output that cannot be written costs what is printed. One that `trains` goes on, says so
    once, and is none the worse; another's result is what it prints, so it fails at its end, except
    where its reader has left.
    """

    def lost(error: OSError) -> None:
        if trains and os.environ.get("RANK", "0") == "0":
            write(
                f"unic_ds: standard output cannot be written ({error.strerror}); the run goes on,"
                " and log.jsonl in its folder has the lines"
            )

    out = streams.protect(lost)
    code = run(main, argv)
    sys.stdout.flush()
    if out.error and not (code or trains or out.error.errno in (errno.EPIPE, errno.EBADF)):
        write(f"unic_ds: error: standard output cannot be written ({out.error.strerror})")
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    One rank's failure ends it here and now: NCCL's groups cannot be left in order while the others
    wait inside a collective, and would be waited for at Python's own exit.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of `main(argv)`, which is 0 or what `main` returns unless it raises.

    A user's mistake is reported by one sentence and 2, a failure that we foresee by one and 1, any
    other exception by its traceback and 1, an interruption by one line and 128 + the signal. It is
    all done here: torch replaces sys.excepthook by one that loses what a process prints last.
    """
    try:
        if not {"--help", "-h"} & set(argv):
            from unic_ds.process import requirements  # 20 ms that --help does without

            requirements.check()
        return main(argv)
    except BaseException as error:
        return report(error)


def report(error: BaseException) -> int:
    """Print how a program failed, once a job; the exit code.

    Under a launcher every rank may find the same: one reports it, rank 0 unless `mute` has settled
    it, and the others wait to be ended with it.
    """
    interrupt.reported.set()
    cause = interrupt.cause(error)
    code, text = exit_message(cause)
    if reports(error):
        interrupt.pause()  # the launcher may end this rank for the failure of another
        write(text)
        return code
    if isinstance(cause, KeyboardInterrupt):
        return code  # every rank gets the signal, and rank 0 says so
    interrupt.stop()
    time.sleep(WAIT_S)  # the launcher ends the job when the first rank leaves: let it be that one
    if is_expected(cause) or SPEAKS in vars(error):
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
    """One printable line about an exception."""
    if is_expected(error) or isinstance(error, interrupt.Interrupted):
        return printable(error)
    return printable(" ".join("".join(traceback.format_exception_only(error)).split()))


def is_expected(error: BaseException) -> bool:
    """True where our own code raised it for the user to read.

    A RuntimeError that C code raised below a line of ours is torch's, and wants its traceback.
    """
    if not isinstance(error, ValueError | OSError | RuntimeError) or not error.__traceback__:
        return False
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    if not Path(code.co_filename).is_relative_to(OWN):
        return False
    return not isinstance(error, RuntimeError) or code.co_code[last.tb_lasti] == RAISE


@contextmanager
def warnings_held() -> Iterator[None]:
    """Hold back warnings and log lines of libraries while the body runs, then print them.

    They are dropped where a user's mistake ends it: its sentence says what they were about.
    """
    held: list[str] = []
    show, last = warnings.showwarning, logging.lastResort

    def keep(*found: Any, **_: Any) -> None:
        held.append(warnings.formatwarning(*found[:4]).rstrip("\n"))

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: held.append(handler.format(record))  # type: ignore[method-assign]
    warnings.showwarning, logging.lastResort = keep, handler
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


def choose_reporter(error: BaseException, *, unless: bool) -> None:
    """Decide whether this rank reports an exception in full, where the ranks have agreed on one."""
    vars(error)[SPEAKS] = unless


def reports(error: BaseException) -> bool:
    """True on the rank that reports an exception in full."""
    return vars(error).get(SPEAKS, os.environ.get("RANK", "0") == "0")


def write(text: str) -> None:
    """Print lines on stderr, in one write; other control characters than line breaks escaped."""
    lines = [printable(line, LONGEST) for line in text.split("\n")]
    with suppress(OSError):
        sys.stderr.write("\n".join(lines) + "\n")
        sys.stderr.flush()
