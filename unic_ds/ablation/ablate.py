"""The work of `unic-ds ablate`: announce a grid, train it, evaluate it, write its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unic_ds import files
from unic_ds.ablation import ablation_page, child, plot, results, run_cells, shared_features, tables
from unic_ds.ablation.cells import Run, Study, shared_images
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
    live = {c: why for c, cfg in cells.items() if (why := shared_features.live_reason(study, cfg))}
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
    trainer, measured = run_cells.Trainer(study, start, total=waiting), True
    failed: list[Run] = []
    for seed in study.grid.seeds:
        failed += trainer.train([run for run in study.runs() if run.seed == seed])
        measured = run_cells.evaluate(study, seed, start) and measured
        write_results(study)
    show_results(study)
    return 1 if failed or not measured else 0


def train_only(study: Study, number: int, start: child.Start = child.start) -> int:
    """Train one run of the grid; the exit code. ValueError for a number of none."""
    run = find_run(study, number)
    return 1 if run_cells.Trainer(study, start).train([run]) else 0


def find_run(study: Study, number: int) -> Run:
    """The run of a number; ValueError if there is none."""
    for run in study.runs():
        if run.number == number:
            return run
    raise ValueError(f"--only must be from 0 to {study.grid.runs - 1}, got {number}")


def collect(study: Study, start: child.Start = child.start) -> int:
    """Evaluate the students that are there, write the results; the exit code."""
    measured = [run_cells.evaluate(study, seed, start) for seed in study.grid.seeds]
    write_results(study)
    found = show_results(study)
    return 1 if found.unfinished or not all(measured) else 0


def write_results(study: Study) -> None:
    """Write the files of the results; nothing without an evaluation."""
    found = results.collect(study)
    if not found.measures:
        return
    png = plot.draw(found)
    results.write(found)
    files.write_atomic(study.out / MARKDOWN, tables.as_markdown(found))
    plot.write(found, png)
    ablation_page.write(found, png)


def show_results(study: Study) -> results.Results:
    """Print the table, or that there is none."""
    found = results.collect(study)
    if found.measures:
        tables.print_to_terminal(found)
        console.say(f"results: {study.out / results.FILE}, {study.out / ablation_page.FILE}")
    else:
        console.say("no student was evaluated")
        for run in found.unfinished:
            console.say(f"without a student: {run.describe()}")
    return found


def show_cells(study: Study) -> None:
    """Print the cells and what would be done."""
    announce(study)
    for cell, options in study.cells.items():
        pairs = " ".join(f"{name}={text!r}" for name, text in options.items())
        done = sum(run.finished for run in runs_of(study, cell))
        state = f" ({done} of {len(study.grid.seeds)} runs are finished)" if done else ""
        console.say(f"  {cell}: {pairs or 'the settings of all cells'}{state}")


def runs_of(study: Study, cell: str) -> Sequence[Run]:
    """The runs of a cell."""
    return [run for run in study.runs() if run.cell == cell]


def default_folder(name: str) -> Path:
    """The folder of a grid that is given none."""
    return Path("runs") / f"ablate_{name}"[:120]
