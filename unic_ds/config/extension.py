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
"""Options that decide the result and may yet differ with --run.extend."""

ALLOWED = {*LENGTH, "stages"}
"""The text of --stages, too: each earlier stage is compared with its own folder."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A run that has trained already."""

    folder: Path
    science: dict[str, str]  # dotted name -> text
    step: int  # of its newest checkpoint, or of the one that is named; 0: it has none
    own: bool  # in the run's own folder, not named by --resume


def check(cfg: Config, out: Path, *, resume: str, last: bool) -> None:
    """Raise ValueError if `cfg` may not resume or extend the run that it would go on with.

    `last` is false for the earlier stages of a run: they are not extended.
    """
    begun = find(out, resume)
    if begun is None:
        if cfg.run.extend and last and resume in ("auto", "never"):
            raise ValueError(
                f"--run.extend true, but --out {str(out)!r} holds no run to train further; name its"
                " folder, give --resume OLD, or --run.extend false to start a new run"
            )
        return
    if begun.own and resume == "never":
        raise ValueError(
            f"--out {str(out)!r} holds a run already; choose another --out or drop --resume never"
        )
    differ = differences(begun, science(cfg))
    extends = last and cfg.run.extend and differ.keys() <= ALLOWED and same_stages(begun, cfg)
    if differ and not extends:
        raise ValueError(f"{foreign(begun, resume, differ)}; {ways(begun, last)}")
    if differ.keys() & set(LENGTH):
        check_start(begun)
        if cfg.optim.steps:
            check_longer(cfg.optim, cfg.optim.steps, after=begun.step)


def find(out: Path, resume: str) -> Begun | None:
    """The run that `--out` and `--resume` go on with; None for a new run."""
    file, saved = out / "config.yaml", checkpoints(out)
    if file.is_file() and (saved or (out / "results.json").is_file()):
        settings = science(recipes.read(file))
        return Begun(folder=out, science=settings, step=step_of(saved), own=True)
    if resume in ("auto", "never"):
        return None
    given = [Path(resume)] if (Path(resume) / "run.json").is_file() else checkpoints(Path(resume))
    facts = read_facts(given[-1]) if given else {}
    given_as = {k[2:]: str(v) for k, v in facts.items() if k.startswith("--")}
    settings = {RENAMED.get(k, k): v for k, v in given_as.items()}
    folder = given[-1].absolute().parent.parent if given else Path(resume)
    return Begun(folder=folder, science=settings, step=step_of(given), own=False)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((out / "checkpoints").glob(f"step_{'[0-9]' * 7}"))


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


def differences(begun: Begun, here: dict[str, str]) -> dict[str, tuple[str, str]]:
    """(text there, text here) of the settings that differ, by dotted name.

    A checkpoint may be older than a setting; its own folder's config.yaml has all.
    """
    there = begun.science
    keys = there.keys() | here.keys() if begun.own else there.keys() & here.keys()
    pairs = {key: (there.get(key, "absent"), here.get(key, "absent")) for key in sorted(keys)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def same_stages(begun: Begun, cfg: Config) -> bool:
    """True if a run folder and `cfg` have equally many stages."""
    there = parse_stages(begun.science.get("stages", ""))
    return len(there) == len(cfg.earlier_stages) or not begun.own


def foreign(begun: Begun, resume: str, differ: dict[str, tuple[str, str]]) -> str:
    """The clause of an error message that names the first options that differ."""
    shown, more = list(differ.items())[:5], len(differ) - 5
    rest = f" and {more} more" if more > 0 else ""
    if begun.own:
        said = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in shown)
        return f"--out {str(begun.folder)!r} holds another run ({said}{rest})"
    said = ", ".join(f"--{key} {was!r}, this run has {now!r}" for key, (was, now) in shown)
    return f"--resume {resume!r} was saved with {said}{rest}"


def ways(begun: Begun, last: bool) -> str:
    """The clause of an error message that says how to resume or extend the run."""
    first = "choose another --out" if begun.own else "use the same"
    longer = "to train longer add --run.extend true, with no change but --optim.epochs or steps"
    if not last:
        longer = (
            "an earlier stage is not trained longer, since the next one started from its student:"
            " give its own settings in --stages, as in 'optim.steps=3'"
        )
    return f"{first}; {longer}; {anew(begun)}"


def anew(begun: Begun) -> str:
    """The clause of an error message that says how to start a new run from this one's weights."""
    student = begun.folder / "student"
    made = f" (`unic-ds export --run {str(begun.folder)!r}` writes such a folder)"
    made = "" if student.is_dir() else made
    where = "another --out and " if begun.own else ""
    return f"to start a new run from its weights give {where}--student.init {str(student)!r}{made}"


def check_start(begun: Begun) -> None:
    """Raise ValueError if a run has no checkpoint left to be extended from."""
    if begun.own and not checkpoints(begun.folder):
        where = str(begun.folder)
        raise ValueError(f"{where!r} has no checkpoint left to be extended from; {anew(begun)}")


def check_longer(cfg: Optim, steps: int, *, after: int) -> None:
    """Raise ValueError unless an extended run of `steps` goes on `after` its checkpoint's step."""
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
