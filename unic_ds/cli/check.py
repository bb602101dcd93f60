"""`unic-ds check`: finds the mistakes in a training command that would end it at its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unic_ds import train
from unic_ds.config import auto_teachers, check, job
from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb, in addition to those of train."""

    ranks: int = option(1, "number of ranks that the command will be started on")

    def __post_init__(self) -> None:
        check(self.ranks > 0, "--ranks", "positive", self.ranks)


VERB = Verb(
    name="check",
    summary="find mistakes in a training command in 10 s, without training",
    options=Options,
    takes="job",
    usage="unic-ds check --ds_config FILE [--option value ...]",
)


def run(argv: Sequence[str]) -> int:
    """Check a training command in one process; return the exit code."""
    call = VERB.read(argv)
    ranks = call.options.ranks
    task = job.resolve(auto_teachers.resolve(call.overrides, ranks=ranks), ranks=ranks)
    if not task.finished:
        from unic_ds.training import acceptance

        acceptance.accept(train.waiting(task))
    verdict = "is finished" if task.finished else f"can be trained by {ranks} ranks"
    print(f"{task.cfg.recipe} in {task.out} {verdict}")
    return 0
