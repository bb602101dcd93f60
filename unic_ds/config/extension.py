"""Resuming and extending a run: the options that may differ. Checked before torch is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unic_ds import files
from unic_ds.config import Config, Optim, recipes
from unic_ds.config.overrides import RENAMED, science
from unic_ds.config.stages import parse as parse_stages

LENGTH = ("optim.epochs", "optim.steps")
"""Options that decide the result, but may differ with --run.extend."""

ALLOWED = {*LENGTH, "stages"}
"""--stages may differ as text, since each earlier stage is compared with its folder."""


@dataclass(frozen=True, kw_only=True)
class PreviousRun:
    """A run that has trained already."""

    folder: Path
    science: dict[str, str]  # dotted name -> text
    step: int  # of its newest checkpoint, or of the one that is named; 0: it has none
    in_place: bool  # in the folder --out, not named by --resume


def check(cfg: Config, out: Path, *, resume: str, last: bool) -> None:
    """Raise ValueError if `cfg` may not resume or extend the run that it would continue.

    `last` is false for the earlier stages of a run: they are not extended.
    """
    previous = find(out, resume)
    if previous is None:
        if cfg.run.extend and last and resume in ("auto", "never"):
            raise ValueError(
                f"--run.extend true, but --out {str(out)!r} holds no run to train further; name its"
                " folder, give --resume OLD, or --run.extend false to start a new run"
            )
        return
    if previous.in_place and resume == "never":
        raise ValueError(
            f"--out {str(out)!r} holds a run already; choose another --out or drop --resume never"
        )
    differ = differences(previous, science(cfg))
    extends = last and cfg.run.extend and differ.keys() <= ALLOWED and same_stages(previous, cfg)
    if differ and not extends:
        raise ValueError(
            f"{difference_clause(previous, resume, differ)}; {remedy_clause(previous, last)}"
        )
    if differ.keys() & set(LENGTH):
        check_start(previous)
        if cfg.optim.steps:
            check_longer(cfg.optim, cfg.optim.steps, after=previous.step)


def find(out: Path, resume: str) -> PreviousRun | None:
    """The run that `--out` and `--resume` continue; None for a new run."""
    file, saved = out / "config.yaml", checkpoints(out)
    if file.is_file() and (saved or (out / "results.json").is_file()):
        settings = science(recipes.read(file))
        return PreviousRun(folder=out, science=settings, step=step_of(saved), in_place=True)
    if resume in ("auto", "never"):
        return None
    named = [Path(resume)] if (Path(resume) / "run.json").is_file() else checkpoints(Path(resume))
    facts = read_facts(named[-1]) if named else {}
    options = {k[2:]: str(v) for k, v in facts.items() if k.startswith("--")}
    settings = {RENAMED.get(k, k): v for k, v in options.items()}
    folder = named[-1].absolute().parent.parent if named else Path(resume)
    return PreviousRun(folder=folder, science=settings, step=step_of(named), in_place=False)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return steps_in(out / "checkpoints")


def steps_in(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, oldest first."""
    return sorted(p for p in folder.glob(f"step_{'[0-9]' * 7}") if p.is_dir())


def step_of(saved: list[Path]) -> int:
    """The step of the last checkpoint in a list; 0 if there is none, or its facts are damaged."""
    step = read_facts(saved[-1]).get("step") if saved else 0
    return step if isinstance(step, int) else 0


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """The facts of a checkpoint; none if they are damaged, which its verification reports."""
    try:
        facts = json.loads(files.read_text(checkpoint / "run.json"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def differences(previous: PreviousRun, here: dict[str, str]) -> dict[str, tuple[str, str]]:
    """(text there, text here) of the settings that differ, by dotted name.

    A checkpoint may be older than a setting; a run folder's config.yaml has all settings.
    """
    there = previous.science
    keys = there.keys() | here.keys() if previous.in_place else there.keys() & here.keys()
    pairs = {key: (there.get(key, "absent"), here.get(key, "absent")) for key in sorted(keys)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def same_stages(previous: PreviousRun, cfg: Config) -> bool:
    """True if a run folder and `cfg` have equally many stages."""
    there = parse_stages(previous.science.get("stages", ""))
    return len(there) == len(cfg.earlier_stages) or not previous.in_place


def difference_clause(
    previous: PreviousRun, resume: str, differ: dict[str, tuple[str, str]]
) -> str:
    """The clause of an error message that names the first options that differ."""
    first, more = list(differ.items())[:5], len(differ) - 5
    rest = f" and {more} more" if more > 0 else ""
    if previous.in_place:
        pairs = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in first)
        return f"--out {str(previous.folder)!r} holds another run ({pairs}{rest})"
    pairs = ", ".join(f"--{key} {was!r}, this run has {now!r}" for key, (was, now) in first)
    return f"--resume {resume!r} was saved with {pairs}{rest}"


def remedy_clause(previous: PreviousRun, last: bool) -> str:
    """Clause of an error message on how to resume or extend the run."""
    first = "choose another --out" if previous.in_place else "use the same"
    longer = "to train longer add --run.extend true, with no change but --optim.epochs or steps"
    if not last:
        longer = (
            "an earlier stage is not trained longer, since the next one started from its student:"
            " give its own settings in --stages, as in 'optim.steps=3'"
        )
    return f"{first}; {longer}; {new_run_clause(previous)}"


def new_run_clause(previous: PreviousRun) -> str:
    """Clause of an error message on how to start a new run from this one's weights."""
    student = previous.folder / "student"
    made = f" (`unic-ds export --run {str(previous.folder)!r}` writes such a folder)"
    made = "" if student.is_dir() else made
    out = "another --out and " if previous.in_place else ""
    return f"to start a new run from its weights give {out}--student.init {str(student)!r}{made}"


def check_start(previous: PreviousRun) -> None:
    """Raise ValueError if a run has no checkpoint left to be extended from."""
    if previous.in_place and not checkpoints(previous.folder):
        folder = str(previous.folder)
        raise ValueError(
            f"{folder!r} has no checkpoint left to be extended from; {new_run_clause(previous)}"
        )


def check_longer(cfg: Optim, steps: int, *, after: int) -> None:
    """Raise ValueError unless an extended run's `steps` exceed its checkpoint's step, `after`."""
    if steps <= after:
        given = f"--optim.steps {cfg.steps}" if cfg.steps else f"--optim.epochs {cfg.epochs:g}"
        raise ValueError(
            f"--run.extend true: the run is trained to step {after}, and {given} means {steps}"
            " steps in all; give more"
        )


def pending(cfg: Config, out: Path) -> bool:
    """True if `cfg` extends the run in `out`, whose config.yaml still has the shorter length."""
    file = out / "config.yaml"
    if not cfg.run.extend or not file.is_file():
        return False
    there, here = science(recipes.read(file)), science(cfg)
    return any(there[key] != here[key] for key in LENGTH)
