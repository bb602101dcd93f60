"""A command line as a job, checked before torch is imported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from unic_ds import demo
from unic_ds.config import (
    Config,
    Student,
    Teacher,
    data_spec,
    ds_config,
    eval_spec,
    extension,
    methods,
    plugins,
    recipes,
)
from unic_ds.config.ds_config import DeepSpeedSettings
from unic_ds.config.option import nearest
from unic_ds.config.overrides import override_all
from unic_ds.files import nearest_existing
from unic_ds.files.documents import read_json
from unic_ds.files.printable import printable

JOB_OPTIONS = {
    "ds_config": "DeepSpeed's settings: ds_configs/zero1.json, zero2, zero3 or zero3_offload, or"
    " your own file (required)",
    "recipe": f"{', '.join(recipes.RECIPES)}; a recipe with a method, like quickstart+radio"
    f" ({', '.join(methods.METHODS)}); or a .yaml file, as a run's config.yaml [quickstart]",
    "out": "run folder; the same command resumes the run there [runs/RECIPE; for x.yaml runs/x]",
    "resume": "auto (resume the run in --out if there is one), never, or the PATH of a run folder"
    " or checkpoint with the same settings [auto]",
    "among": "with --teachers auto: the candidates, comma-separated names of the recipe's teachers,"
    " SOURCE or NAME=SOURCE [the recipe's teachers]",
    "budget": "with --teachers auto: GFLOPs of an image that the chosen teachers may cost together",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run: its options, DeepSpeed's settings and its folder."""

    cfg: Config
    settings: DeepSpeedSettings
    out: Path
    resume: str
    init: str  # model folder or encoder weights to start from; empty: random, from the seed
    before: tuple[Job, ...] = ()  # earlier stages, in subfolders of `out`

    @property
    def finished(self) -> bool:
        """True if the run has exported its student and written its table."""
        return ended(self.out) and not extension.pending(self.cfg, self.out)


def ended(out: Path) -> bool:
    """True if a stage's folder holds its exported student and its table."""
    return (out / "student" / "model.safetensors").is_file() and (out / "results.json").is_file()


def stop_files(out: Path, given: str) -> list[Path]:
    """Files at which a run saves and stops: OUT/STOP, then --run.stop_file."""
    return [out / "STOP", *map(Path, filter(None, [given]))]


def resolve(options: dict[str, str], ranks: int | None = None) -> Job:
    """The Job of the options; ValueError, one sentence, for every mistake of a user.

    `ranks` None: as in the launcher's environment.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
    job_options = {k: v for k, v in options.items() if k in JOB_OPTIONS}
    options = run_options(options)
    if "ds_config" not in job_options:
        near = nearest("ds_config", list(options))
        raise ValueError(
            f"--ds_config is needed{near}, for example --ds_config ds_configs/zero2.json"
        )
    file = ds_config.read(job_options["ds_config"])
    cfg = configure(job_options.get("recipe", "quickstart"), options)
    out = out_folder(job_options)
    resume, jobs, init = job_options.get("resume", "auto"), [], cfg.student.init
    for stage, folder in staged(cfg, out):
        settings = ds_config.merge(file, stage, ranks)
        jobs.append(Job(cfg=stage, settings=settings, out=folder, resume=resume, init=init))
        init = str(folder / "student")
    check_resume(resume, stages=len(jobs))
    for job in jobs:
        check_folder(job, last=job is jobs[-1])
    check_inputs(cfg, out)
    check_room(out)
    return replace(jobs[-1], before=tuple(jobs[:-1]))


def run_options(options: Mapping[str, str]) -> dict[str, str]:
    """The options that are settings of a run."""
    others = {*JOB_OPTIONS, "local_rank"}  # the deepspeed launcher adds local_rank
    return {name: text for name, text in options.items() if name not in others}


def out_folder(job_options: Mapping[str, str]) -> Path:
    """The run folder of the options, or the recipe's default; ValueError if it cannot be a path."""
    name = (
        recipes.folder_name(job_options.get("recipe", "quickstart"))
        if "out" not in job_options
        else ""
    )
    given = job_options.get("out", f"runs/{name}")
    if not given:
        raise ValueError("--out is empty; give a folder, or leave it out for runs/RECIPE")
    try:
        os.lstat(given)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, or in a folder that may not be read
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"--out {printable(given)!r} cannot be written ({why})") from None
    return Path(given)


def staged(cfg: Config, out: Path) -> list[tuple[Config, Path]]:
    """(Config, folder) of every stage; the last is `cfg`, in `out` itself."""
    stages = []
    for stage in cfg.earlier_stages:
        try:
            changed = override_all(replace(cfg, stages=""), stage.options)
        except ValueError as error:
            raise ValueError(f"{stage.describe()}: {error}") from None
        stages.append((changed, out / stage.folder))
    return [*stages, (cfg, out)]


def configure(recipe: str, options: dict[str, str]) -> Config:
    """Import the plugins, and apply the options to the recipe; ValueError for an unknown name."""
    given = load_plugins(options)
    cfg = recipes.get(recipe, options.get("teachers", ""), plugins=given)
    plugins.load(cfg.plugins)  # those of a recipe's file
    options = {name: text for name, text in options.items() if name != "teachers"}
    return override_all(cfg, options, others=tuple(JOB_OPTIONS))


def load_plugins(options: Mapping[str, str]) -> tuple[str, ...]:
    """Import the modules of `--plugins`; their names."""
    given = tuple(filter(None, map(str.strip, options.get("plugins", "").split(","))))
    plugins.load(given)
    return given


def check_inputs(cfg: Config, out: Path) -> None:
    """Raise ValueError for missing teachers or images; prepares the demonstration if it is used.

    `out` is the run's folder.
    """
    if not cfg.teachers:
        raise ValueError("no teachers; give --teachers SOURCE,SOURCE or a --recipe that has some")
    if not cfg.data.train:
        raise ValueError(f"recipe {cfg.recipe} has no images; give --data.train DIR")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # the node's first rank checks and prepares; the others wait for it
    prepare_demonstration(cfg)
    check_init(cfg.student)
    eval_spec.folders(cfg.eval.data, plugins=bool(cfg.plugins))
    for key, given in (("train", cfg.data.train), ("val", cfg.data.val)):
        if given:
            try:
                data_spec.check(given, f"--data.{key}")
            except OSError as error:  # a name that is too long, for one
                name = printable(given)
                raise ValueError(f"--data.{key} {name!r}: {error.strerror}") from None
    for stage, folder in staged(cfg, out):
        try:
            check_domains(stage)
            check_token_kinds(stage)
        except ValueError as error:
            where = f"{folder.name}: " if folder != out else ""
            raise ValueError(f"{where}{error}") from None
    for teacher in cfg.teachers:
        if teacher.parsed_source.kind == "run":
            refuse_itself(teacher, out)
    for teacher in () if cfg.cache else cfg.teachers:
        if teacher.parsed_source.kind == "file":
            weight_file(teacher)
        elif teacher.parsed_source.kind == "run":
            student_folder(teacher)


def check_domains(cfg: Config) -> None:
    """Raise ValueError unless teachers name sources of the images, and each has a teacher."""
    if not any(row.domains for row in cfg.teachers):
        return
    sources = mixed_sources(cfg, "teachers.NAME.data")
    seen = {i for row in cfg.teachers for i in seen_sources(row, sources)}
    for i, path in enumerate(sources):
        if i not in seen:
            raise ValueError(
                f"no teacher sees the images of {printable(path)!r}; add it to a"
                " --teachers.NAME.data, or leave it out of --data.train"
            )


def check_token_kinds(cfg: Config) -> None:
    """Raise ValueError unless loss.tokens names sources and leaves every teacher a loss there."""
    if not cfg.loss.kind_of_source:
        return
    sources = mixed_sources(cfg, "loss.tokens")
    only: dict[int, str] = {}
    for name, kind in cfg.loss.kind_of_source.items():
        i = source_named(name, sources, "loss.tokens")
        if only.setdefault(i, kind) != kind:
            raise ValueError(
                f"loss.tokens gives {printable(sources[i])!r} two kinds of token; give it one"
            )
    for row in cfg.teachers:
        kinds, seen = cfg.distance(row).kinds, seen_sources(row, sources)
        for i in seen:
            if i in only and only[i] not in kinds:
                raise ValueError(
                    f"teacher {row.name!r} has no loss of {only[i]} tokens, but loss.tokens leaves"
                    f" no others on {printable(sources[i])!r}; give --teachers.{row.name}.data"
                    " without this source, or change --loss.tokens"
                )
        for kind in kinds:
            if all(only.get(i, kind) != kind for i in seen):
                raise ValueError(
                    f"loss.tokens leaves teacher {row.name!r} no images with a loss of {kind}"
                    f" tokens; give --teachers.{row.name}.{kind}_loss none"
                )


def mixed_sources(cfg: Config, option: str) -> list[str]:
    """Paths of the training images' sources; ValueError unless they are several."""
    sources = [str(part.path) for part in data_spec.parts(cfg.data.train)]
    if len(sources) < 2:
        raise ValueError(
            f"{option} needs a mixture of sources; give --data.train A,B, got"
            f" {printable(', '.join(sources))!r} alone"
        )
    return sources


def seen_sources(row: Teacher, sources: list[str]) -> list[int]:
    """Indices of the sources whose images a teacher sees; ValueError for a name of none."""
    option = f"teachers.{row.name}.data"
    named = [source_named(name, sources, option) for name in row.domains]
    return named or list(range(len(sources)))


def source_named(name: str, sources: list[str], option: str) -> int:
    """Index of the source that a name stands for; ValueError unless it is one."""
    found = data_spec.indices_of(name, sources)
    if len(found) != 1:
        several = "several sources" if found else "no source"
        raise ValueError(
            f"{option}: {printable(name)!r} stands for {several} of --data.train; give as much of"
            f" the end of a path as tells them apart: {', '.join(map(printable, sources))}"
        )
    return found[0]


def weight_file(row: Teacher) -> Path:
    """The weight file of a `file:` teacher; ValueError if it does not exist."""
    path = row.parsed_source.path
    if kind_of(path) != "file":
        raise ValueError(
            f"teacher {row.name!r} has no weights at {printable(path)!r}; put them there or give"
            f" --teachers.{row.name}.source (`unic-ds teachers fetch` has those of hubs)"
        )
    return Path(path).expanduser()


def student_folder(row: Teacher) -> Path:
    """The model folder of a `run:` teacher: itself, or the run's `student/`.

    ValueError if it does not exist, or its run is not finished.
    """
    path = row.parsed_source.path
    names = ("model.safetensors", "config.json")
    for folder in (path, f"{path}/student"):
        if all(kind_of(f"{folder}/{name}") == "file" for name in names):
            return Path(folder).expanduser()
    shown = printable(path)
    if kind_of(f"{path}/config.yaml") == "file":
        raise ValueError(
            f"teacher {row.name!r}: the run {shown!r} is not finished, it has no student/; start"
            f" its command again, or export its newest checkpoint (`unic-ds export {shown}`) and"
            f" give --teachers.{row.name}.source run:FOLDER"
        )
    raise ValueError(
        f"teacher {row.name!r}: {shown!r} holds neither a run nor a student"
        f" ({' and '.join(names)}); give --teachers.{row.name}.source run:PATH of a"
        " finished run or of its student/"
    )


def refuse_itself(row: Teacher, out: Path) -> None:
    """Raise ValueError if a `run:` teacher is the student of the run in `out`, or of its stages."""
    try:
        folder = Path(row.parsed_source.path).expanduser().resolve()
        inside = folder.is_relative_to(out.resolve())
    except (OSError, RuntimeError):  # links in a circle, or the home of an unknown user
        return
    if inside:
        raise ValueError(
            f"teacher {row.name!r}: {printable(row.source)!r} is this run itself, whose --out is"
            f" {printable(out)!r}; give --teachers.{row.name}.source another run, or another --out"
        )


def check_init(student: Student) -> None:
    """Raise ValueError if --student.init names no weights, or those of other blocks."""
    path = student.init
    kind = kind_of(path)
    if path and kind == "folder" and kind_of(f"{path}/model.safetensors") != "file":
        raise ValueError(
            f"--student.init {path!r} holds no model.safetensors; give a run's student/ folder"
        )
    if path and kind != "folder" and not (kind == "file" and path.endswith(".safetensors")):
        raise ValueError(f"--student.init {path!r} is no model folder and no .safetensors file")
    if path and kind == "folder" and kind_of(f"{path}/config.json") == "file":
        check_blocks(student, Path(path).expanduser() / "config.json")


def check_blocks(student: Student, file: Path) -> None:
    """Raise ValueError unless timm's config of an encoder has the student's heads and MLP width."""
    try:
        found = read_json(file)["model_args"]
        theirs = {name: found.get(name, 0) for name in ("heads", "mlp_width")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # the weights are compared when they are read
    if theirs != {name: getattr(student, name) for name in theirs}:
        kind = "a pruned student" if any(theirs.values()) else "no pruned student"
        options = " ".join(f"--student.{name} {printable(x, 20)}" for name, x in theirs.items())
        raise ValueError(
            f"--student.init {str(file.parent)!r} is {kind}; give the run the shape of its blocks:"
            f" {options}"
        )


def kind_of(path: str) -> str:
    """`file` or `folder`; empty for anything else, also for text that cannot be a path."""
    try:
        given = Path(path).expanduser()
        return "folder" if given.is_dir() else "file" if given.is_file() else ""
    except (OSError, RuntimeError):  # too long, or in the home of an unknown user
        return ""


def prepare_demonstration(cfg: Config) -> None:
    """Make the quickstart's files if the Config uses them and they are missing."""
    try:
        images = (
            [str(path) for path, _ in data_spec.parts(cfg.data.train)] if cfg.data.train else []
        )
    except OSError:  # `check_inputs` raises the error
        return
    paths = [*images, *(t.parsed_source.path for t in cfg.teachers)]
    if any(path.startswith(str(demo.root())) for path in paths) and not demo.ready():
        demo.prepare()


def check_resume(resume: str, *, stages: int) -> None:
    """Raise ValueError if --resume names nothing that a run of `stages` stages can resume."""
    if resume in ("auto", "never"):
        return
    if kind_of(resume) != "folder":
        raise ValueError(
            f"--resume {resume!r} is neither auto, never nor a run folder or checkpoint; weights"
            " alone start a new run by --student.init"
        )
    if stages > 1:
        raise ValueError(f"--resume {resume!r} is of one stage; add --stages '' to train one alone")


def check_folder(job: Job, *, last: bool) -> None:
    """Raise ValueError if --out is a file, or its run cannot be resumed with these options."""
    if job.out.exists() and not job.out.is_dir():
        raise ValueError(f"--out {str(job.out)!r} is a file; give a folder")
    extension.check(job.cfg, job.out, resume=job.resume, last=last)
    if last and job.finished and (job.out / "config.yaml").is_file():
        refuse_other_runs(job)


def refuse_other_runs(job: Job) -> None:
    """Raise ValueError if a finished run had the student of another path as its teacher.

    A run that goes on compares the content of the weights, so the path may differ there.
    """
    there = {row.name: row.source for row in recipes.read(job.out / "config.yaml").teachers}
    for row in job.cfg.teachers:
        if row.parsed_source.kind == "run" and not same_run(there.get(row.name, row.source), row):
            raise ValueError(
                f"--out {str(job.out)!r} holds a finished run whose teachers.{row.name}.source was"
                f" {printable(there[row.name])!r}, now {printable(row.source)!r}; choose another"
                " --out, or give the same"
            )


def same_run(source: str, row: Teacher) -> bool:
    """True if a source is that of a `run:` teacher, perhaps by another path."""
    try:
        other, ours = (student_folder(replace(row, source=text)) for text in (source, row.source))
        return source == row.source or other.resolve() == ours.resolve()
    except (OSError, ValueError, RuntimeError):  # a folder that is gone, or no path
        return source == row.source


def check_room(out: Path) -> None:
    """Raise ValueError if the run folder cannot be written; leaves no files behind."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(out)):
            pass
    except OSError as error:
        raise ValueError(f"--out {str(out)!r} cannot be written ({error.strerror})") from None
