"""`unic-ds export`: writes the encoder of a run's newest checkpoint as a model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb."""

    run: str = option("", "run folder (needed)")
    out: str = option("", "new folder; default: RUN/encoders/CHECKPOINT")


VERB = Verb(
    name="export",
    summary="write the encoder of a run's newest checkpoint as a folder that timm loads",
    options=Options,
    usage="unic-ds export --run DIR [--out DIR]",
)


def run(argv: Sequence[str]) -> int:
    """Export the newest checkpoint of a run's current stage; return the exit code."""
    call = VERB.read(argv)
    options = call.options
    if not options.run or ("out" in call.given and not options.out):
        raise ValueError(
            "export needs --run DIR (a run folder), and may have --out DIR (a new folder)"
        )
    from unic_ds.training import student_folder

    print(student_folder.from_checkpoint(Path(options.run), out=options.out))
    return 0
