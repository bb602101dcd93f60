"""`--teachers auto`: the options of a training command with teachers that a comparison chose.

Rank 0 runs `unic-ds teachers compare` in a process of its own, so that torch is not imported before
the job is checked, and keeps the choice in the run folder, where the other ranks wait for it.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from unic_ds import files
from unic_ds.config import Config, extension, job, recipes, teacher_choice
from unic_ds.config.option import check
from unic_ds.config.overrides import AUTO, coerce, parse_teachers, split_teachers
from unic_ds.config.teacher_choice import Choice, Wanted
from unic_ds.files import run_files, run_lock
from unic_ds.files.printable import printable
from unic_ds.process import child_verb, console, interrupt

OPTIONS = ("among", "budget")
BEAT = ".teacher_choice.running"
"""File that rank 0 rewrites while it chooses."""
BEAT_S = 10.0
SILENCE_S = 300.0
"""Seconds between two such writes, and those after which the others no longer wait for one."""
FIRST_BEAT_S = 1200.0
"""Seconds that they wait for the first: rank 0 looks through all images before."""
POLL_S = 2.0
"""Hundreds of ranks may read the files."""
MEASURED = {"eval.size": "0", "eval.protocol": "quick"}
"""Options of the run's table that would change size and crop of the compared images."""

Options = dict[str, str]
"""Of a training command, as text."""


def resolve(options: Mapping[str, str], ranks: int | None = None) -> Options:
    """The options with teachers in the place of `auto`; other options come back as they are.

    Every rank calls it. The choice that the run folder keeps is used, or else one is made. `ranks`
    as in `job.resolve`. ValueError, one sentence, for a user's mistake, before teachers are
    compared; those that only their models show follow from the comparison.
    """
    given = {name: text for name, text in options.items() if name not in OPTIONS}
    if options.get("teachers", "").strip() != AUTO:
        for name in OPTIONS:
            if name in options:
                raise ValueError(f"--{name} goes with --teachers auto; add that, or leave it out")
        return given
    words = candidates(options)
    given["teachers"] = ",".join(words.values())
    cfg = configured(given, tuple(words))
    wanted = Wanted(
        budget=budget_of(options), words=words, settings=teacher_choice.settings_of(cfg)
    )
    choice = chosen(given, cfg, wanted, ranks)
    for line in choice.describe():
        console.say(line)
    return without_others(given, wanted, choice)


def candidates(options: Mapping[str, str]) -> dict[str, str]:
    """Name of each candidate -> its word in `--among`; ValueError for fewer than two."""
    job.load_plugins(options)
    recipe, _ = recipes.without_methods(options.get("recipe", "quickstart"))
    words = split_teachers(options.get("among", "")) or [row.name for row in recipe.teachers]
    rows = parse_teachers(",".join(words), recipe.teachers, "--among")
    if len(rows) < 2:
        raise ValueError(
            f"--teachers auto chooses among two teachers or more, got {len(rows)}; give --among"
            " A=SOURCE,B=SOURCE"
        )
    names = [row.name for row in rows]
    distinct = len(set(names)) == len(names)
    check(distinct, "--among's names", "different (write NAME=SOURCE)", ",".join(names))
    return dict(zip(names, words, strict=True))


def budget_of(options: Mapping[str, str]) -> float:
    """`--budget` in GFLOPs; ValueError unless it is a positive number."""
    if "budget" not in options:
        raise ValueError(
            "--teachers auto needs --budget, the GFLOPs of an image that the chosen teachers may"
            " cost together (`unic-ds teachers compare` prints those of each)"
        )
    budget: float = coerce(float, options["budget"], "--budget")
    check(budget > 0, "--budget", "positive", options["budget"])
    return budget


def configured(given: Options, names: tuple[str, ...]) -> Config:
    """The Config with all candidates; ValueError for one in which a choice has no meaning."""
    cfg = job.configure(given.get("recipe", "quickstart"), job.run_options(given))
    if tuple(row.name for row in cfg.teachers) != names:
        raise ValueError(
            f"--recipe {given.get('recipe')!r} makes teachers of its own of those that it is given,"
            " so none can be chosen; name them by --teachers"
        )
    for row in cfg.teachers:
        named = f"--teachers.{row.name}.data"
        check(not row.domains, named, "empty with --teachers auto, which compares on all", row.data)
    for stage in cfg.earlier_stages:
        for name in stage.options:
            if name.split(".")[0] == "teachers":
                raise ValueError(
                    f"{stage.describe()} sets {name}, but --teachers auto may leave that teacher"
                    " out; set it for all stages, or name the teachers"
                )
    return cfg


def chosen(given: Options, cfg: Config, wanted: Wanted, ranks: int | None) -> Choice:
    """The choice that the run folder keeps, if it answers; else that of a comparison."""
    out = job.out_folder(given)
    kept = teacher_choice.read(out)
    if kept and kept.answers(wanted):
        return kept
    if any(extension.find(folder, "auto") for _, folder in job.staged(cfg, out)):
        return choice_of_run(kept, wanted, out)
    check_new(given, cfg)
    job.resolve(given, ranks)  # with all candidates: every mistake that needs no model
    if run_lock.is_held(out):
        raise run_lock.refusal(out)
    if not console.first_rank():
        return wait_for_choice(out, wanted)
    interrupt.install()
    with files.made_folder(out), signs_of_life(out):
        return compare(given, wanted, out)


def choice_of_run(kept: Choice | None, wanted: Wanted, out: Path) -> Choice:
    """The choice of a run that has begun; ValueError unless it is of the same candidates.

    What else differs is found as for any run that is resumed.
    """
    again = (
        f"choose another --out, or go on with --out {str(out)!r} --recipe"
        f" {str(out / 'config.yaml')!r}, without --teachers auto"
    )
    if kept is None:
        raise ValueError(
            f"--out {str(out)!r} holds a run, but no choice of its teachers ({run_files.CHOICE});"
            f" {again}"
        )
    if not kept.of_same_teachers(wanted):
        was, now = (
            f"{','.join(names)} within {budget:g} GFLOPs"
            for names, budget in (
                (teacher_choice.sources(kept.settings), kept.budget),
                (wanted.words, wanted.budget),
            )
        )
        raise ValueError(
            f"--out {str(out)!r} holds a run whose teachers were chosen among {printable(was)}, now"
            f" among {now}; {again}"
        )
    return kept


def check_new(given: Options, cfg: Config) -> None:
    """Raise ValueError for options that do not go with teachers that are yet to be chosen."""
    resume = given.get("resume", "auto")
    check(resume in ("auto", "never"), "--resume", "auto or never with --teachers auto", resume)
    if cfg.cache:
        raise ValueError(
            f"--teachers.cache {printable(cfg.cache)!r} has features of known teachers, which cost"
            " nothing; leave it out, or name the teachers instead of --teachers auto"
        )


def compare(given: Options, wanted: Wanted, out: Path) -> Choice:
    """Compare the candidates in a process of its own, and keep the choice in the run folder."""
    console.say(
        f"--teachers auto: comparing {len(wanted.words)} teachers on images of"
        f" {printable(wanted.settings['data.train'])}"
    )
    with tempfile.TemporaryDirectory(prefix="unic_ds_") as folder:
        options = {"recipe": given.get("recipe", "quickstart"), **job.run_options(given)}
        options |= MEASURED | {"budget": repr(wanted.budget), "out": folder, "json": "true"}
        words = [f"--{name}={text}" for name, text in options.items()]
        child_verb.run(["teachers", "compare", *words], console.say)
        text = files.read_text(Path(folder) / run_files.COMPARISON)
        picture = (Path(folder) / run_files.COMPARISON_PICTURE).read_bytes()
    selection = json.loads(text)["selection"]
    choice = teacher_choice.of_plain(selection, wanted.budget, wanted.settings)
    with files.open_atomic(out / run_files.COMPARISON_PICTURE) as stream:
        stream.write(picture)
    files.write_atomic(out / run_files.COMPARISON, text)
    teacher_choice.write(choice, out)  # last: the others wait for it
    return choice


@contextmanager
def signs_of_life(out: Path) -> Iterator[None]:
    """Context manager that rewrites `BEAT` in a folder until its end."""
    ended = threading.Event()

    def beat() -> None:
        while True:
            with suppress(OSError):
                files.write_atomic(out / BEAT, str(time.time_ns()))
            if ended.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, name="teacher choice", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            (out / BEAT).unlink()


def wait_for_choice(
    out: Path, wanted: Wanted, silence_s: float = SILENCE_S, first_s: float = FIRST_BEAT_S
) -> Choice:
    """The choice that rank 0 makes.

    TimeoutError if it gives no first sign of life for `first_s`, or no further for `silence_s`.
    """
    seen, since = "", time.monotonic()
    while True:
        kept = teacher_choice.read(out)
        if kept and kept.answers(wanted):
            return kept
        with suppress(OSError, ValueError):
            if (now := files.read_text(out / BEAT)) != seen:
                seen, since = now, time.monotonic()
        limit_s = silence_s if seen else first_s
        if time.monotonic() - since > limit_s:
            raise TimeoutError(
                f"no choice of teachers in {str(out)!r}, and no sign of life from rank 0, which"
                f" makes it, for {limit_s:.0f} s; see its output, and give an --out that all"
                " nodes share"
            )
        time.sleep(POLL_S)


def without_others(given: Options, wanted: Wanted, choice: Choice) -> Options:
    """The options with the chosen teachers, in the order of `--among`, and none of others."""
    names = [name for name in wanted.words if name in choice.chosen]
    given = given | {"teachers": ",".join(wanted.words[name] for name in names)}
    others = [f"teachers.{name}." for name in wanted.words if name not in names]
    dropped = [name for name in given if name.startswith(tuple(others))]
    if dropped:
        shown = ", ".join(f"--{name}" for name in dropped)
        console.say(f"not used, of teachers that were left out: {shown}")
    return {name: text for name, text in given.items() if name not in dropped}
