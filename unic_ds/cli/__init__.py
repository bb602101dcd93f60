"""`unic-ds VERB`: finds the verb of a command line and runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from unic_ds.cli import (
    ablate,
    cache,
    check,
    doctor,
    eval,
    export,
    forms,
    import_unic,
    pack,
    pack_verify,
    plan,
    push,
    quickstart,
    report,
    teachers_check,
    teachers_compare,
    teachers_fetch,
    teachers_start,
    train,
    watch,
)
from unic_ds.config import args, help_text
from unic_ds.config.overrides import nearest
from unic_ds.process import entry_point

MODULES = (
    quickstart,
    train,
    check,
    plan,
    doctor,
    watch,
    teachers_check,
    teachers_compare,
    teachers_fetch,
    teachers_start,
    pack,
    pack_verify,
    cache,
    eval,
    ablate,
    report,
    export,
    forms,
    import_unic,
    push,
)
VERBS = {module.VERB.name: module for module in MODULES}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and leave with its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    entry_point.start(dispatch, argv, trains=argv[:1] == ["train"])


def dispatch(argv: Sequence[str]) -> int:
    """Run the verb of a command line, or print help; return the exit code."""
    words, options = args.parse(argv)
    names = [name for name in VERBS if words[: len(name.split())] == name.split()]
    if not words or (args.wants_help(options) and not names):
        print(overview())
        return 0
    if not names:
        verb = " ".join(words)
        raise ValueError(f"unknown verb {verb!r}{nearest(verb, list(VERBS))}; there are {known()}")
    name = max(names, key=len)  # `pack verify` is not `pack`
    if args.wants_help(options):
        print(VERBS[name].VERB.help())
        return 0
    rest = list(argv)
    for word in name.split():
        rest.remove(word)
    VERBS[name].VERB.stay_offline()
    return VERBS[name].run(rest)


def known() -> str:
    """The verbs, joined by commas."""
    return ", ".join(VERBS)


def overview() -> str:
    """Text of `unic-ds --help`."""
    rows = [
        help_text.Row(" ".join([name, *module.VERB.arguments]), "", module.VERB.summary)
        for name, module in VERBS.items()
    ]
    return help_text.render(
        "unic-ds VERB [--option value ...]",
        "Distil frozen vision models into one ViT student.",
        [help_text.Section("verbs", "", rows)],
        "unic-ds VERB --help lists the options of a verb.",
    )
