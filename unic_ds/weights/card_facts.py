"""Facts of a model card: its teachers and their terms, metadata, results and settings.

Text that comes from outside is escaped here or in `card`; folders of this machine never appear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from unic_ds import config
from unic_ds.config import overrides
from unic_ds.config.teacher_source import TeacherSource
from unic_ds.evaluate.comparison import Comparison, Row
from unic_ds.files.printable import printable
from unic_ds.teachers import licences, sources
from unic_ds.teachers.licences import Terms
from unic_ds.weights.card_names import KEY

TAGS = ("image-feature-extraction", "distillation")
METRICS = {
    "knn": ("image-classification", "accuracy"),
    "linear": ("image-classification", "accuracy"),
    "transfer": ("image-classification", "accuracy"),
    "transfer_knn": ("image-classification", "accuracy"),
    "robustness": ("image-classification", "accuracy"),
    "zeroshot": ("zero-shot-image-classification", "accuracy"),
    "retrieval mAP": ("image-feature-extraction", "map"),
    "retrieval": ("image-feature-extraction", "recall"),
    "segmentation mIoU": ("image-segmentation", "mean_iou"),
    "segmentation": ("image-segmentation", "accuracy"),
    "detection": ("object-detection", "map"),
    "depth RMSE": ("depth-estimation", "rmse"),
}
"""Beginning of a row's name -> the hub's names of task and metric; other rows have none there."""


class TeacherRow(NamedTuple):
    """A teacher on the card."""

    name: str
    source: str  # without folders
    licence: str  # as its weights say; empty: unknown
    hash: str  # hex SHA-256, empty if unknown
    repository: str  # on the hub, empty if it has none

    @property
    def terms(self) -> Terms:
        """The terms of its licence."""
        return licences.licence_class(self.licence)


def teacher_rows(cfg: config.Config, manifest: Mapping[str, Mapping[str, Any]]) -> list[TeacherRow]:
    """The teachers of the settings and of a run's manifest."""
    rows = {row.name: row for row in cfg.teachers}
    names = dict.fromkeys([*manifest, *rows])
    return [teacher_row(name, manifest.get(name, {}), rows.get(name)) for name in names]


def teacher_row(name: str, facts: Mapping[str, Any], row: config.Teacher | None) -> TeacherRow:
    """A teacher by its facts in the manifest and, if there is one, its row of the settings."""
    source = str(facts.get("source") or "unknown")
    try:
        row = row or config.Teacher(name=name, source=source)
        source = row.parsed_source.without_folders
    except ValueError:  # a manifest of another program
        row = None
    return TeacherRow(
        name,
        without_folders(source),
        str(facts.get("licence") or ""),
        str(facts.get("content") or facts.get("sha256") or ""),
        repository_of(row) if row else "",
    )


def repository_of(row: config.Teacher) -> str:
    """A teacher's repository on the hub, empty unless its id is valid there."""
    found = sources.hub_repository(row)
    try:
        validate_repo_id(found)
    except HFValidationError:
        return ""
    return found if "/" in found else ""


def metadata(
    rows: Sequence[TeacherRow],
    *,
    library: str = "timm",
    licence: str = "",
    named: str = "",
    results: Sequence[EvalResult] = (),
) -> ModelCardData:
    """The card's YAML metadata, in Hugging Face's format; `results` are those of a model `named`.

    `library` is the hub's name of what loads the folder, and `licence` the weights' own if they
    were imported.
    """
    repositories = list(dict.fromkeys(row.repository for row in rows if row.repository))
    facts = [
        {
            "name": printable(row.name),
            "source": printable(row.source),
            "licence": printable(row.licence) or "unknown",
            "terms": row.terms,
            **({"hash": row.hash} if re.fullmatch(r"[0-9a-f]{64}", row.hash) else {}),
        }
        for row in rows
    ]
    data = ModelCardData(
        library_name=library,
        pipeline_tag="image-feature-extraction",
        tags=[library, *TAGS],
        base_model=repositories or None,
        model_name=named if results else None,
        eval_results=list(results) or None,
    )
    # The hub takes several base models for a merge of weights, unless it is told otherwise; it has
    # no word for distillation.
    relation = {"base_model_relation": "finetune"} if repositories else {}
    for key, text in (licence_keys(rows, licence) | relation).items():
        data[key] = text
    data[KEY] = {"teachers": facts} | ({"licence": printable(licence)} if licence else {})
    return data


def licence_keys(rows: Sequence[TeacherRow], own: str = "") -> dict[str, str]:
    """`license` of the metadata, and its name and link if the hub has no id for it.

    That of the teachers, and the weights' own, whose terms are not permissive, or else of all.
    """
    texts = [*(row.licence for row in rows), *([own] if own else [])]
    stated = {licences.identify(part) for text in texts for part in licences.parts(text)}
    found = {licence for licence in stated if licence.terms != "permissive"} or stated
    names = sorted(licence.id or licence.terms.replace(" ", "-") for licence in found)
    names = list(dict.fromkeys(names)) or ["unknown"]
    if len(names) == 1 and (names[0] in licences.ON_HUB or names[0] == "unknown"):
        return {"license": names[0]}
    link = next((licence.link for licence in found if licence.link), "")
    linked = {"license_link": link} if link and len(names) == 1 else {}
    return {"license": "other", "license_name": "-and-".join(names)} | linked


def eval_results(comparison: Comparison, cfg: config.Config) -> list[EvalResult]:
    """The students' finite values for the metadata's `model-index`, as far as the hub has names."""
    found = []
    for row in comparison.rows:
        for student in comparison.named("student"):
            names = metric_of(row)
            value = row.finite().get(student)
            if names is None or value is None:
                continue
            images = images_of(row, cfg)
            found.append(
                EvalResult(
                    task_type=names[0],
                    dataset_type="imagefolder",
                    dataset_name=images,
                    dataset_config=images,  # results are grouped by it, not by the name
                    metric_type=names[1],
                    metric_name=printable(f"{row.name} {row.unit}".rstrip()),
                    metric_value=round(value, 4),
                    metric_args={"protocol": printable(row.protocols.get(student, ""))},
                )
            )
    return found


def metric_of(row: Row) -> tuple[str, str] | None:
    """The hub's names of a row's task and metric, None if it has none."""
    words = row.name.split()
    beginnings = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    return next((METRICS[name] for name in beginnings if name in METRICS), None)


def images_of(row: Row, cfg: config.Config) -> str:
    """Name of the data set that a row was measured on: that of its folder."""
    given: dict[str, str] = {}
    for part in filter(None, map(str.strip, cfg.eval.data.split(","))):
        task, equals, path = part.partition("=")
        given |= {task: path} if equals else {"": part}
    own = cfg.data.val or cfg.data.train
    return folder_name(given.get((row.name.split() or [""])[0], given.get("", own)))


def folder_name(text: str) -> str:
    """Names of the images that `--data.train` or another option gives, without their folders."""
    return printable(last_names(text)) or "images"


def last_names(text: str, ends: str = ",=") -> str:
    """Text whose paths are cut to their last names; `ends` are characters that separate paths."""
    return re.sub(rf"[^{ends}]*/", "", re.sub(rf"/+(?=[{ends}]|$)", "", text))


def without_folders(text: str) -> str:
    """Text of a setting; if it begins a path somewhere, every path in it is cut to its name."""
    if not re.search(r"(^|[\s,;:='\"(\[])(~|/|\.{1,2}/)", text):
        return text
    return last_names(text, ",;=#:")


PATHS = {"data.train", "data.val", "eval.data", "eval.cache", "eval.class_names", "eval.templates"}
PATHS |= {"probe.data", "cache", "student.init", "run.stop_file"}
"""Settings that are paths, also relative ones."""


def settings(cfg: config.Config) -> str:
    """All settings as YAML that `--recipe FILE` reads, with paths cut to their names."""
    plain = shortened(overrides.to_dict(cfg))
    return yaml.safe_dump(plain, sort_keys=False, width=100_000).rstrip()


def shortened(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with paths cut to their names."""
    return {key: short(value, f"{prefix}{key}") for key, value in plain.items()}


def short(value: object, name: str) -> object:
    """One setting, or those of a section, with paths cut to their names."""
    if isinstance(value, dict):
        return shortened(value, f"{name}.")
    if isinstance(value, list):
        return [short(part, name) for part in value]
    if not isinstance(value, str):
        return value
    if name in PATHS and "/" in value:
        return last_names(value)
    if name.startswith("teachers.") and name.endswith(".source"):
        if value.startswith("file:"):
            return f"file:{PurePath(value.removeprefix('file:')).name}"
        if value.startswith("run:"):
            return TeacherSource.parse(value).without_folders
    return without_folders(value)


MAIN = (
    *("recipe", "precision", "seed", "stages", "cache", "data.augment"),
    *("optim.steps", "optim.epochs", "optim.batch_size", "optim.lr", "optim.weight_decay"),
    *("optim.ema", "student.drop_path", "student.init", "ladder.rungs", "ladder.width"),
    *("loss.cls", "loss.patch", "balance.kind", "drop.rate"),
)
"""Settings that are read first."""


def main_settings(cfg: config.Config) -> Iterator[tuple[str, str]]:
    """Yield name and text of the `MAIN` settings, without those that are empty or 0."""
    flat = overrides.flatten(shortened(overrides.to_dict(cfg)))
    return (
        (name, flat[name]) for name in MAIN if flat.get(name) not in (None, "", "0", "0.0", "none")
    )


def rows_by_terms(rows: Iterable[TeacherRow]) -> list[tuple[Terms, list[TeacherRow]]]:
    """Rows by the terms that bind whoever uses the student, the strictest first."""
    found: dict[Terms, list[TeacherRow]] = {}
    for row in rows:
        found.setdefault(row.terms, []).append(row)
    order = sorted(found, key=licences.STRICTNESS.index, reverse=True)
    return [(terms, found[terms]) for terms in order]
