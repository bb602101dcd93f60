"""An evaluation from text to table: opens the sets, builds the models, runs the tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unic_ds import dist, files
from unic_ds.config import Config, Teacher, eval_spec
from unic_ds.config.evaluation import TASKS
from unic_ds.data import Source
from unic_ds.evaluate import registry
from unic_ds.evaluate.comparison import Comparison, Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.evaluator import ChecksItsData
from unic_ds.evaluate.features import Model
from unic_ds.evaluate.table import NEEDS
from unic_ds.files.printable import printable
from unic_ds.harness import classifiers, layouts, models, text_towers
from unic_ds.harness.feature_cache import FeatureCache
from unic_ds.harness.image_sets import SampledImages, can_evaluate, find_images
from unic_ds.harness.layouts import Sets
from unic_ds.harness.score_cache import ScoreCache
from unic_ds.models.encoder import grid_of
from unic_ds.process import console

TEXT = "a text tower (open_clip:, or a timm: image tower that open_clip has too)"
CLASSIFIER = "a classifier of its own (timm: or file: weights with one)"


def evaluate(
    tasks: Sequence[str], specs: Sequence[str], cfg: Config, *, export: Callable[[Path], Path]
) -> Comparison:
    """Evaluate models by tasks; every rank calls it, and each has the result.

    `specs` are as in `models.build`; `export` writes a student folder from a run's newest
    checkpoint. ValueError, one sentence, for a user's mistake, before any feature is computed.
    """
    sets = open_sets(tasks, cfg)
    built = models.build(specs, cfg, dist.device(), export=export)
    rows = [*cfg.teachers, *models.source_rows(specs, cfg)]
    return compare(built, sets, cfg, rows=rows, store=feature_store(cfg), strict=True)


def open_sets(tasks: Sequence[str], cfg: Config) -> dict[str, Sets]:
    """The image sets of each task; tasks with one layout and folder share them."""
    given = eval_spec.folders(cfg.eval.data, plugins=bool(cfg.plugins))
    opened: dict[tuple[object, Path | None], Sets] = {}
    found: dict[str, Sets] = {}
    for task in tasks:
        folder = given.get(task, given.get(""))
        key = (layouts.layout_of(task), folder)  # tasks with equal ones share features
        if key not in opened:
            opened[key] = layouts.open_sets(task, folder, cfg) if folder else sets_of_run(task, cfg)
        found[task] = opened[key]
    return found


def open_sets_of_run(cfg: Config, train: Source, val: Source | None) -> dict[str, Sets]:
    """The image sets of each task after training: the run's own images, or those of --eval.data.

    Tasks that need labels are left out if the images of the run cannot have them. Errors as
    `open_sets`.
    """
    given = eval_spec.folders(cfg.eval.data, plugins=bool(cfg.plugins))
    labelled = can_evaluate(train, val)
    own = own_sets(cfg, train, val, labelled=labelled) if val else None
    others = [name for name in registry.EVALUATORS if name not in TASKS]  # of plugins
    tasks = dict.fromkeys([*cfg.eval.tasks, *others, *filter(None, given)])
    opened = open_sets([task for task in tasks if task in given or "" in given], cfg)
    found: dict[str, Sets] = {}
    for task in tasks:
        if task in opened:
            found[task] = opened[task]
        elif own and (labelled or "labels" not in registry.EVALUATORS[task].data_needs):
            found[task] = own
    return found


def own_sets(cfg: Config, train: Source, val: Source, *, labelled: bool = True) -> Sets:
    """A run's training and validation images, as many as the settings allow."""
    limits = {"train": cfg.eval.max_train, "val": cfg.eval.max_val}
    return {
        name: SampledImages(source, cfg, limits[name], labelled=labelled, name=name)
        for name, source in (("train", train), ("val", val))
    }


def sets_of_run(task: str, cfg: Config) -> Sets:
    """The training and validation images of a run's settings; ValueError without them."""
    if not layouts.has_class_folders(task):
        raise ValueError(
            f"the task {task} needs data of its own; give --eval.data {task}=DIR"
            " (docs/evaluation.md has its layout)"
        )
    train, val = find_images(cfg)
    if not val:
        raise ValueError(
            f"the task {task} needs validation images; give --eval.data DIR, --data.val DIR or"
            " --data.val_share"
        )
    labelled = can_evaluate(train, val)
    if not labelled and "labels" in registry.EVALUATORS[task].data_needs:
        raise ValueError(f"the task {task} needs labels: {NEEDS}")
    return own_sets(cfg, train, val, labelled=labelled)


def compare(
    models: Sequence[Model],
    sets: Mapping[str, Sets],
    cfg: Config,
    *,
    rows: Sequence[Teacher],
    store: FeatureCache | None = None,
    strict: bool = False,
) -> Comparison:
    """Evaluate models by each task on its sets; tasks on the same sets share features.

    `strict`: ValueError, before anything is computed, for a task that can measure none of them.
    `rows` are the teachers whose text towers and classifiers the tasks zeroshot and plugplay use.
    """
    data = data_of(sets, cfg, rows=rows, store=store)
    return compare_on(models, sets, data, store=store, strict=strict)


def compare_on(
    models: Sequence[Model],
    sets: Mapping[str, Sets],
    data: Mapping[int, EvalData],
    *,
    store: FeatureCache | None = None,
    strict: bool = False,
) -> Comparison:
    """As `compare`, with the result of `data_of`, which keeps the features that tasks took."""
    for task, found in sets.items():
        check(task, models, data[id(found)], strict=strict)
    scores: list[Score] = []
    kept = ScoreCache(store.root / "scores" if store else None)
    for task, found in sets.items():
        file = kept.file_of(task, models, data[id(found)])
        known = kept.read(file)
        earlier = f"; as evaluated before, in {file}" if known is not None else ""
        console.say(f"task {task}: {describe(found)}{earlier}")
        if known is None:
            known = registry.evaluate_models(models, data[id(found)], [task])
            kept.write(file, known)
        if strict and not known:
            raise ValueError(
                f"the task {task} measured none of the models; teacher, zeroshot and plugplay need"
                " a student and a teacher that it predicts, by the teacher's name in the run"
            )
        scores += known
    return Comparison.of(scores, {model.name: model.role for model in models})


def data_of(
    sets: Mapping[str, Sets],
    cfg: Config,
    *,
    rows: Sequence[Teacher],
    store: FeatureCache | None,
) -> dict[int, EvalData]:
    """Data of an evaluation by the id of its sets, with the parts of teachers that tasks need."""
    grid, device = grid_of(cfg.student), dist.device()
    towers = text_towers.read_all(rows, grid=grid, device=device) if "zeroshot" in sets else {}
    heads = classifiers.read_all(rows, grid=grid, device=device) if "plugplay" in sets else {}
    require("zeroshot" not in sets or towers, "zeroshot", TEXT)
    require("plugplay" not in sets or heads, "plugplay", CLASSIFIER)
    return {
        id(found): EvalData(
            found,
            options=cfg.eval,
            seed=cfg.seed,
            device=device,
            store=store,
            text_towers=towers,
            classifiers=heads,
        )
        for found in sets.values()
    }


def check(task: str, models: Sequence[Model], data: EvalData, *, strict: bool) -> None:
    """Raise ValueError for data that do not fit a task; if `strict`, also if no model does."""
    obstacle = registry.obstacle_of(task, models, data)
    if obstacle and strict:
        raise ValueError(f"{obstacle}; leave the task out, or give other models or images")
    evaluator = registry.EVALUATORS[task]
    if not obstacle and isinstance(evaluator, ChecksItsData):
        evaluator.check(data)


def require(found: object, task: str, needed: str) -> None:
    """Raise ValueError unless the part of a teacher that a task needs is found."""
    if not found:
        raise ValueError(
            f"the task {task} needs a teacher with {needed}; leave the task out, or evaluate models"
            " with such a teacher"
        )


def feature_store(cfg: Config) -> FeatureCache | None:
    """The feature cache of --eval.cache; None for `none`."""
    if cfg.eval.cache == "none":
        return None
    folder = cfg.eval.cache
    return FeatureCache(Path(folder) if folder else files.cache_root() / "features")


def describe(sets: Sets) -> str:
    """Number of samples of each set."""
    return ", ".join(f"{len(found)} {printable(name)}" for name, found in sets.items())
