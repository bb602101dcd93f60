"""The thin door: Fire turns a command line into words and raw strings before anything else happens.

Fire alone runs first and complains after, and guesses types (`runs#2` becomes `runs`, `007` an int,
`a,b` a tuple); here it only collects, the caller checks, and a mistake costs one sentence and exit
code 2.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

OWN = Path(__file__).parent


def parse(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(bare words, options as raw strings) of a command line; `-` in a name reads as `_`."""
    import fire
    from fire.decorators import SetParseFn

    flags = [word.split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    if "__" in flags or "-" in argv:
        raise ValueError(f"{'--' if '__' in flags else '-'!r} is no option; write --name value")
    if twice := [flag for flag in flags if flags.count(flag) > 1]:
        raise ValueError(f"--{twice[0][2:]} is given twice; give it once")
    taken: list[tuple[list[str], dict[str, str]]] = []

    @SetParseFn(str)
    def collect(*words: str, **options: str) -> None:
        taken.append((list(words), options))

    fire.Fire(collect, command=list(argv), name="unic-ds")
    words, options = taken[0]
    return words, options


def wants_help(options: dict[str, str]) -> bool:
    """Whether `--help` or `-h` is among the options."""
    return "help" in options or "h" in options


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of `main(argv)`: a user's mistake is one sentence and 2, a failure 1.

    Under a launcher every rank finds the same mistake: rank 0 says it, the others wait to be ended
    with it.
    """
    try:
        return main(argv)
    except ValueError as error:
        if not ours(error):
            raise
        return say(str(error), 2)
    except (OSError, RuntimeError) as error:
        if not ours(error):
            raise
        return say(str(error), 1)


def ours(error: BaseException) -> bool:
    """Whether our own code raised it, so that its sentence is meant for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(OWN)


def say(sentence: str, code: int) -> int:
    """Print an error once per job and return its exit code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"unic_ds: error: {sentence}", file=sys.stderr, flush=True)
    else:
        time.sleep(
            10
        )  # the launcher ends the job when the first rank leaves: let it be the one that spoke
        print(f"unic_ds: rank {os.environ['RANK']}: error: {sentence}", file=sys.stderr, flush=True)
    return code
