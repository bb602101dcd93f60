"""`unic-ds push`: uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unic_ds.config.option import option
from unic_ds.config.verb import Verb
from unic_ds.process import entry_point


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb."""

    private: bool = option(False, "create a repository that only its owner sees")
    dry_run: bool = option(False, "print all that would be sent, and send nothing")
    revision: str = option("", "branch, created if there is none; default: main")


VERB = Verb(
    name="push",
    summary="upload an exported folder, with its model card, to the Hugging Face hub",
    options=Options,
    arguments={
        "FOLDER": "run folder (its student/), or the folder of an export",
        "REPOSITORY": "OWNER/NAME on the hub",
    },
    needs_hub=True,
)


def run(argv: Sequence[str]) -> int:
    """Check and upload a folder, print the address of the commit; return the exit code."""
    call = VERB.read(argv)
    folder, repository = call.arguments
    options = call.options
    from unic_ds.weights import push

    upload = push.plan(Path(folder), repository, private=options.private, revision=options.revision)
    if options.dry_run:
        print(f"{upload.describe()}\nnothing was sent (--dry_run)")
        return 0
    for line in upload.warnings:
        entry_point.write(f"warning: {line}")
    print(push.send(upload))
    return 0
