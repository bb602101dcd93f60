"""The work of `unic-ds ablate`: announce a grid, train it, evaluate it, write its results."""

from __future__ import annotations

from pathlib import Path

from unic_ds import files
from unic_ds.ablation import (
    ablation_page,
    child,
    evaluations,
    plot,
    results,
    run_cells,
    shared_features,
    tables,
)
from unic_ds.ablation.cells import Run, Study, shared_images
from unic_ds.config import job
from unic_ds.files.printable import printable
from unic_ds.process import console

MARKDOWN = "ablation.md"


def announce(study: Study) -> None:
    """Print how much there is to do, and what is odd about it."""
    grid = study.grid
    count = f"{grid.count} cells x {len(grid.seeds)} seeds = {grid.runs} runs"
    console.say(f"{count} of {length_of(study)}, in {study.out}; tasks: {grid.tasks}")
    if shared := shared_images(study.base):
        console.say(f"these evaluation images are training images, too: {', '.join(shared)}")
    say_what_is_cached(study)


def length_of(study: Study) -> str:
    """The length of the runs in words."""
    configs = [study.config(cell, study.grid.seeds[0]) for cell in study.cells]
    found = dict.fromkeys(
        f"{cfg.optim.steps:,} step(s)" if cfg.optim.steps else f"{cfg.optim.epochs:g} epoch(s)"
        for cfg in configs
    )
    return " or ".join(list(found)[:5]) + " each"


def say_what_is_cached(study: Study) -> None:
    """Print which cells train on stored features, if some do."""
    if not study.views:
        return
    cells = {cell: study.config(cell, study.grid.seeds[0]) for cell in study.cells}
    live = [c for c, cfg in cells.items() if shared_features.live_reason(study, c, cfg)]
    if len(live) == len(cells):
        return
    console.say(
        f"teachers' features are stored once, in {study.out / 'features'}, of {study.views} view(s)"
        " of each image (--views; 0: teachers run in every step)"
    )
    if live:
        console.say(
            f"{', '.join(live)}: the teachers run live, on new views in each epoch; compare these"
            " cells with each other, or with all others under --views 0"
        )


def train_and_evaluate(study: Study, start: child.Start = child.start) -> int:
    """Train what is not finished seed by seed, evaluate, write the results; the exit code."""
    announce(study)
    waiting = sum(not run.finished for run in study.runs())
    if done := study.grid.runs - waiting:
        console.say(f"{done} of {study.grid.runs} runs are finished already")
    trainer = run_cells.Trainer(study, start, total=waiting)
    failed: list[Run] = []
    complete = True
    for seed in study.grid.seeds:
        failed += trainer.train(list(study.runs_of(seed)))
        complete = evaluations.evaluate(study, seed, start) and complete
        found = results.collect(study)
        complete = write_results(found) and complete
    show_results(found)
    return 1 if failed or not complete else 0


def train_only(study: Study, number: int, start: child.Start = child.start) -> int:
    """Train one run of the grid; the exit code. ValueError for a number of none."""
    run = find_run(study, number)
    return 1 if run_cells.Trainer(study, start).train([run]) else 0


def find_run(study: Study, number: int) -> Run:
    """The run of a number; ValueError if there is none."""
    if not 0 <= number < study.grid.runs:
        raise ValueError(f"--only must be from 0 to {study.grid.runs - 1}, got {number}")
    seed, place = divmod(number, len(study.cells))
    return study.run(list(study.cells)[place], study.grid.seeds[seed])


def collect(study: Study, start: child.Start = child.start) -> int:
    """Evaluate the students that are there, write the results; the exit code."""
    measured = [evaluations.evaluate(study, seed, start) for seed in study.grid.seeds]
    found = results.collect(study)
    complete = write_results(found) and all(measured)
    show_results(found)
    return 1 if found.unfinished or not complete else 0


def write_results(found: results.Results) -> bool:
    """Write the files of the results, numbers first; nothing without an evaluation.

    False, after a line that says why, if the picture or the page cannot be made.
    """
    if not found.measures:
        return True
    out = found.study.out
    results.write(found)
    files.write_atomic(out / MARKDOWN, tables.as_markdown(found))
    name = plot.FILE
    try:
        png = plot.draw(found)
        plot.write(found, png)
        name = ablation_page.FILE
        ablation_page.write(found, png)
    except Exception as error:  # of a library that draws: the numbers are written
        why = printable(f"{type(error).__name__}: {error}")
        console.say(f"{out / name} cannot be made: {why}; {out / results.FILE} has the numbers")
        return False
    return True


def show_results(found: results.Results) -> None:
    """Print the table, or that there is none."""
    if found.measures:
        tables.print_to_terminal(found)
        out = found.study.out
        console.say(f"results: {out / results.FILE}, {out / ablation_page.FILE}")
        return
    console.say("no student was evaluated")
    for run in found.unfinished:
        console.say(f"without a student: {run.describe()}")


def show_cells(study: Study) -> None:
    """Print the cells and what would be done."""
    announce(study)
    for cell, options in study.cells.items():
        pairs = " ".join(f"{name}={text!r}" for name, text in options.items())
        done = sum(job.ended(study.folder(cell, seed)) for seed in study.grid.seeds)
        state = f" ({done} of {len(study.grid.seeds)} runs are finished)" if done else ""
        console.say(f"  {cell}: {pairs or 'the settings of all cells'}{state}")


def default_folder(name: str) -> Path:
    """The folder of a grid that is given none."""
    return Path("runs") / f"ablate_{name}"[:120]
