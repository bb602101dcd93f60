"""Effect of each lever on a small student: `lever_effects.py --out DIR [--seeds 0,1] [--only A,B]`.

Trains a shortened quickstart for each row of `LEVERS` and each seed, one after another, in
DIR/LEVER/seedN. The teachers' features are stored before, once for each seed, in
DIR/features/NAME/seedN: all runs of a seed have the same images, views and initial weights. The
same command goes on after a stop. Prints a table in Markdown of the runs that are finished; exits
with 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from forked import Forked
from runs import TRAIN, start, verb

from unic_ds import demo
from unic_ds.config.job import ended
from unic_ds.evaluate import comparison
from unic_ds.process import console, entry_point

SHORT = {
    "recipe": "quickstart",
    "student.size": "48",
    "student.heads": "1",
    "student.mlp_width": "192",
    "ladder.rungs": "5,11",
    "ladder.last_width": "192",
    "teachers.dinov2.size": "42",
    "optim.epochs": "2",
    "optim.batch_size": "32",
}
"""Options of all runs and of the features."""

TRAINING = {
    "ds_config": "ds_configs/zero2.json",
    "data.threads": "1",
    "eval.on": "false",
    "probe.pictures": "0",
    "run.save_every": "0",
}
"""Further options of all runs."""

OTHER_SIDES = (32, 64)
"""Sides in pixels, besides the student's, at which all students are evaluated."""

LINES = 6
"""Lines of the log at the end of a run, of five steps each, over which distances are averaged."""

EFFNET, DINOV2 = (str(demo.root() / part) for part in demo.PARTS[1:3])
BIG = "big=run:{out}/big/seed{seed}"
BIG_ALONE = {
    "teachers": BIG,
    "teachers.big.precision": demo.precision(),
    "teachers.dinov2.size": None,
}
ALL_THREE = {
    "teachers": f"{BIG},effnet=file:{EFFNET}#arch=tf_efficientnet_lite0,"
    f"dinov2=file:{DINOV2}#arch=vit_small_patch14_dinov2",
    "teachers.big.precision": demo.precision(),
    "teachers.effnet.size": "112",
    "teachers.effnet.channels_last": "true",
    "teachers.effnet.precision": demo.precision(),
    "teachers.dinov2.block": "10",
    "teachers.dinov2.precision": demo.precision(),
}
"""The quickstart's teachers and a big student of theirs."""

TARGET = {"teachers.dinov2.resize": "target", "teachers.dinov2.size": "84"}
LARGER = {"teachers.dinov2.resize": "larger", "teachers.dinov2.size": "84"}

Options = Mapping[str, str | None]
"""Option -> value, which may name the folder and the seed; None: without it."""

FEATURES: dict[str, Options] = {
    "plain": {},
    "target": TARGET,
    "larger": LARGER,
    "big": ALL_THREE,
}
"""Stored features: name -> options of the teachers that are not the quickstart's."""


@dataclass(frozen=True)
class Lever:
    """A row of the table."""

    name: str
    options: Options = field(default_factory=dict)
    against: str = "baseline"
    """The row that it is compared with, seed by seed."""
    features: str = "plain"
    """The name of its stored features; empty: its teachers run."""
    same_targets: bool = True
    """False if its distances are to other targets than those of the row it is compared with."""


STANDARD = {"recipe": "quickstart+standard"}
RELATIONAL = "0.5 cosine + 0.5 smooth_l1 + relational"
LEVERS = (
    Lever("baseline"),
    Lever("lazy", {"drop.lazy": "true"}),
    Lever("no-dropping", {"balance.kind": "none"}),
    Lever("famo", {"balance.kind": "famo"}, against="no-dropping"),
    Lever("mgda", {"balance.kind": "mgda"}, against="no-dropping"),
    Lever("relational", {"loss.cls": RELATIONAL}),
    Lever("effnet-patch-2", {"teachers.effnet.patch_loss": "1 cosine + 1 smooth_l1"}),
    Lever(
        "standard-cosine",
        STANDARD | {"loss.cls": "cosine"},
        against="no-dropping",
        same_targets=False,
    ),
    Lever("dispersion", STANDARD | {"loss.cls": "dispersion"}, against="standard-cosine"),
    Lever("resize-target", TARGET, features="target", same_targets=False),
    Lever("resize-larger", LARGER, against="resize-target", features="larger", same_targets=False),
    Lever("multi-resolution", {"data.sizes": "32,48,64"}),
    Lever("online", features=""),
    Lever("shift", {"loss.shift": "1"}, against="online", features=""),
    Lever("big", {"student.heads": "0", "student.mlp_width": "0"}),
    Lever("from-big", BIG_ALONE, features="big"),
    Lever("big-and-teachers", ALL_THREE, features="big"),
)
"""In the order in which they are trained: `big` before the rows that it teaches."""


@dataclass(frozen=True)
class Result:
    """Values of a finished run."""

    knn: float
    """Accuracy in %."""
    elsewhere: float
    """The same at `OTHER_SIDES`, their mean."""
    distance: float | None
    """1 - cosine, mean over kinds of token and the quickstart's teachers; None without these."""


def words(options: Options, *, out: Path, seed: int) -> list[str]:
    """A command line of options."""
    kept = {key: value for key, value in options.items() if value is not None}
    filled = {key: value.format(out=out, seed=seed) for key, value in kept.items()}
    return [word for key, value in filled.items() for word in (f"--{key}", value)]


def folder(out: Path, lever: Lever, seed: int) -> Path:
    """The folder of a run."""
    return out / lever.name / f"seed{seed}"


def execute(command: Forked, log: Path) -> bool:
    """Run a command in a process of its own, whose output goes to a file; True if it succeeded."""
    process = start(command)
    output, _ = process.communicate()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(output)
    return process.returncode == 0


def train(out: Path, lever: Lever, seed: int) -> bool:
    """Store the features of a run unless they are there, then train it; True if it is finished."""
    if ended(folder(out, lever, seed)):
        return True
    shared, logs = {"seed": str(seed)}, out / "logs"
    more = {"out": str(folder(out, lever, seed))}
    if lever.features:
        features = out / "features" / lever.features / f"seed{seed}"
        store = words(SHORT | FEATURES[lever.features] | shared, out=out, seed=seed)
        log = logs / f"{lever.features}-features-{seed}.txt"
        if not execute(verb("cache", features, *store), log):
            return False
        more["teachers.cache"] = str(features)
    options = SHORT | TRAINING | lever.options | shared | more
    trained = Forked(1, [TRAIN, *words(options, out=out, seed=seed)])
    return execute(trained, logs / f"{lever.name}-{seed}.txt")


def evaluate(out: Path, seed: int) -> dict[str, Result]:
    """Evaluate `pixels` and the students of all finished runs of a seed, by name of their lever."""
    runs = {lever.name: folder(out, lever, seed) for lever in LEVERS}
    runs = {name: run for name, run in runs.items() if ended(run)}
    named = ",".join(["pixels", *(f"{name}={run}" for name, run in runs.items())])
    sides, to = ",".join(map(str, OTHER_SIDES)), out / "eval" / f"seed{seed}"
    given = ["--models", named, "--eval.sizes", sides, "--out", str(to)]
    if not execute(verb("eval", "knn,resolutions", *given), out / "logs" / f"eval-{seed}.txt"):
        raise RuntimeError(f"the evaluation failed; {out / 'logs'} has its output")
    rows = {row.name: row.values for row in comparison.read(to).rows}
    others = [rows[f"resolutions knn {side}"] for side in OTHER_SIDES]
    return {
        name: Result(rows["knn"][name], mean(row[name] for row in others), distance_of(run))
        for name, run in runs.items()
    } | {"pixels": Result(rows["knn"]["pixels"], rows["knn"]["pixels"], None)}


def distance_of(run: Path) -> float | None:
    """The distance at the end of a run's log."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    keys = [f"{name}/{kind}_cosine" for name in ("effnet", "dinov2") for kind in ("cls", "patch")]
    rows = [line for line in log if "loss" in line][-LINES:]
    found = all(key in row for row in rows for key in keys)
    return mean(1 - row[key] for row in rows for key in keys) if found else None


Results = dict[str, dict[int, Result]]
"""Lever -> seed -> result."""


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation, by the format of a number; `-` if there are none."""
    if not values:
        return "-"
    middle = format(mean(values), form)
    return f"{middle} +- {format(stdev(values), form.lstrip('+'))}" if len(values) > 1 else middle


def differences(
    ours: Mapping[int, Result], theirs: Mapping[int, Result], of: Callable[[Result], float | None]
) -> list[float]:
    """Differences of a value to another row's runs of the same seeds."""
    pairs = [(of(ours[seed]), of(theirs[seed])) for seed in ours.keys() & theirs.keys()]
    return [a - b for a, b in pairs if a is not None and b is not None]


def table(found: Results, levers: Sequence[Lever]) -> str:
    """The results in Markdown."""
    lines = [
        "| lever | seeds | kNN % | against | kNN, difference | at other sides, difference"
        " | distance | distance, difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for lever in levers:
        ours, theirs = found[lever.name], found.get(lever.against, {})
        if not ours:
            continue
        of_row = [one.distance for one in ours.values() if one.distance is not None]
        first = lever.name == lever.against
        knn = [] if first else differences(ours, theirs, lambda one: one.knn)
        sides = [] if first else differences(ours, theirs, lambda one: one.elsewhere)
        comparable = lever.same_targets and not first
        distance = [] if not comparable else differences(ours, theirs, lambda one: one.distance)
        cells = [
            f"`{lever.name}`",
            str(len(ours)),
            spread([one.knn for one in ours.values()], ".1f"),
            "-" if first else f"`{lever.against}`",
            spread(knn, "+.1f"),
            spread(sides, "+.1f"),
            spread(of_row, ".3f"),
            spread(distance, "+.3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name in ("pixels", "baseline"):
        here, elsewhere = (
            spread([of(one) for one in found[name].values()], ".1f")
            for of in (lambda one: one.knn, lambda one: one.elsewhere)
        )
        lines.append(f"\nkNN % of {name}: {here}; at other sides {elsewhere}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Train what is not finished, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(lever.name for lever in LEVERS))
    given = parser.parse_args(argv)
    seeds, only = [int(seed) for seed in given.seeds.split(",")], given.only.split(",")
    if unknown := set(only) - {lever.name for lever in LEVERS}:
        raise ValueError(f"--only has no levers called {', '.join(sorted(unknown))}")
    demo.prepare()
    failed = []
    for seed in seeds:
        for lever in (lever for lever in LEVERS if lever.name in only):
            console.say(f"{lever.name}, seed {seed}")
            if not train(given.out, lever, seed):
                failed.append(f"{lever.name}, seed {seed}")
    by_seed = {seed: evaluate(given.out, seed) for seed in seeds}
    found = {
        name: {seed: values[name] for seed, values in by_seed.items() if name in values}
        for name in ["pixels", *(lever.name for lever in LEVERS)]
    }
    console.say(table(found, LEVERS))
    for run in failed:
        console.say(f"failed: {run}; {given.out / 'logs'} has its output")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(entry_point.run(main, sys.argv[1:]))
