"""Distil teachers into a student: the entry point. The loop is `training/loop.py`.

deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json [--recipe NAME] [--out DIR]
[--section.key value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # The launcher puts this file's folder first on the path, where `data` or `log` would shadow
    # other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from unic_ds.config import args, auto_teachers, job, recipes
from unic_ds.config.verb import NoOptions, Verb
from unic_ds.process import console, entry_point, interrupt

VERB = Verb(
    name="train",
    summary="train a student; the same command again resumes, a finished run prints its table",
    options=NoOptions,
    takes="job",
    usage="deepspeed unic_ds/train.py --ds_config FILE [--recipe R] [--section.key VALUE ...]\n"
    "       unic-ds train --ds_config FILE ...    (one process)",
)


def main(argv: Sequence[str]) -> int:
    """Check the command line, then train; the exit code."""
    interrupt.install()
    VERB.stay_offline()  # before plugins are imported
    words, options = args.parse(argv)
    if args.wants_help(options):
        print(VERB.help())
        return 0
    if words:
        raise ValueError(
            f"{words[0]!r} belongs to no option; write --name value, and quote a value with spaces"
        )
    task = job.resolve(auto_teachers.resolve(options))
    if task.finished:
        return show(task)
    stages = waiting(task)  # before anything runs, so that all ranks find the same
    from unic_ds.training import loop

    loop.run_stages(task, stages)
    return 0


def waiting(task: job.Job) -> list[job.Job]:
    """The stages of a run that are not finished, in order."""
    return [stage for stage in (*task.before, task) if not stage.finished]


def show(task: job.Job) -> int:
    """Print the table of a finished run, or why it has none; the exit code."""
    from unic_ds.evaluate import comparison, table

    if console.first_rank():
        again = "--run.extend true trains longer, with more --optim.steps or --optim.epochs"
        console.say(f"{task.out} is finished (choose another --out to train again; {again})\n")
        found, file = comparison.read(task.out), task.out / "config.yaml"
        cfg = recipes.read(file) if file.is_file() else task.cfg
        none = table.unevaluated(task.out / "student", on=cfg.eval.on)
        console.say(table.render(found) if found.rows else none)
        if (report := task.out / "report.html").is_file():
            console.say(f"report: {report}")
    return 0


if __name__ == "__main__":
    entry_point.start(main, sys.argv[1:], trains=True)
