"""A command line as bare words and options, which are raw strings.

By itself Fire runs a function before it rejects an unknown option, and guesses types (`runs#2`
becomes `runs`, `007` an int, `a,b` a tuple). Here it only collects text, which the caller checks.
"""

from __future__ import annotations

from collections.abc import Sequence


def parse(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(bare words, options as raw strings) of a command line; `-` in a name reads as `_`."""
    import fire

    flags = [word.split("=")[0].replace("-", "_") for word in argv if word.startswith("--")]
    if "__" in flags or "-" in argv:
        raise ValueError(f"{'--' if '__' in flags else '-'!r} is no option; write --name value")
    if twice := [flag for flag in flags if flags.count(flag) > 1]:
        raise ValueError(f"--{twice[0][2:]} is given twice; give it once")
    collected: list[tuple[list[str], dict[str, str]]] = []

    @fire.decorators.SetParseFn(str)
    def collect(*words: str, **options: str) -> None:
        collected.append((list(words), options))

    fire.Fire(collect, command=list(argv), name="unic-ds")
    words, options = collected[0]
    return words, options


def wants_help(options: dict[str, str]) -> bool:
    """True if `--help` or `-h` is among the options."""
    return "help" in options or "h" in options
