"""Options of the evaluation of frozen models, its tasks, and published protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unic_ds.config.option import MOST_PIXELS, check, check_most, option

TASKS = {
    "knn": "k nearest neighbours on CLS features",
    "linear": "linear probe on CLS features",
    "transfer": "linear probe on each class-folder data set of a folder, and the mean",
    "transfer_knn": "kNN on each class-folder data set of a folder, and the mean",
    "robustness": "one linear probe on several test folders (ImageNet-V2, -R, -A, -Sketch, ReaL)",
    "retrieval": "mAP and recall@k of images of the same class",
    "zeroshot": "classification by class names, with the text tower of a CLIP or SigLIP teacher",
    "plugplay": "a teacher's own classifier on the student's prediction of its features",
    "teacher": "agreement of the student's predictions with each teacher's features",
    "resolutions": "kNN and agreement with the teachers at several image sizes",
    "rankme": "effective rank of the features; needs no labels",
    "utility": "linear probe of features pruned or projected to fewer dimensions",
    "segmentation": "linear segmentation head on patch tokens (ADE20K, VOC)",
    "depth": "linear depth head on patch tokens (NYU)",
    "detection": "detector on a frozen encoder (COCO)",
    "correspondence": "matching keypoints by patch tokens (SPair)",
}
"""Tasks by name; the registry of evaluators has the same names."""

PROBES = ("knn", "linear", "retrieval", "teacher", "rankme", "utility")
"""Tasks on a run's own images that take one side of a model: those that a probe may have."""

FEWEST_COMPARED = 20
"""Images that `unic-ds teachers compare` needs: half fit a regression, ten are neighbours."""


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """A published way to measure features."""

    crop: float = 1.0
    """Side of the central crop as a part of the resized image's shorter side."""
    k: tuple[int, ...] = (10,)
    votes: Literal["weighted", "majority"] = "weighted"
    """Weighted by exp(similarity / temperature), or one vote a neighbour."""
    distance: Literal["cosine", "l2"] = "cosine"
    linear: Literal["grid", "optuna", "sgd", "sgd_augmented"] = "grid"


PROTOCOLS = {
    "quick": EvalProtocol(),
    "unic": EvalProtocol(k=(20,), linear="optuna"),
    "dinov2": EvalProtocol(crop=224 / 256, k=(10, 20, 100, 200), linear="sgd_augmented"),
    "radio": EvalProtocol(k=(20,), linear="sgd"),
    "eupe": EvalProtocol(k=(10,), votes="majority", distance="l2", linear="sgd"),
}
"""By the value of --eval.protocol (arXiv 2408.05088, 2304.07193, 2312.06709, 2603.22387)."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation of frozen features, after the last step and by `unic-ds eval`."""

    on: bool = option(
        True,
        "evaluate after training, if the images have at least two class folders",
        machinery=True,
    )
    tasks: tuple[str, ...] = option(
        ("knn", "linear", "teacher", "resolutions"),
        "tasks after training on the run's own validation images; those of --eval.data are added",
        machinery=True,
    )
    data: str = option(
        "",
        "data of further tasks, comma-separated TASK=DIR; docs/evaluation.md has their layouts",
        machinery=True,
    )
    protocol: Literal["quick", "unic", "dinov2", "radio", "eupe"] = option(
        "quick",
        "published protocol that sets crop, neighbours, votes and linear probe; quick: small sets"
        " in seconds",
        machinery=True,
    )
    k: tuple[int, ...] = option(
        (), "numbers of neighbours of kNN, comma-separated; empty: the protocol's", machinery=True
    )
    temperature: float = option(
        0.07, "softmax temperature of the neighbours' votes", machinery=True
    )
    size: int = option(0, "image size in pixels; 0: each model's own", machinery=True)
    sizes: tuple[int, ...] = option(
        (),
        "image sizes of the task resolutions, comma-separated; empty: half, once, 1.5 times and"
        " twice the student's",
        machinery=True,
    )
    head_images: int = option(
        0,
        "images on which a segmentation, depth or detection head is trained, over all steps; 0: the"
        " protocol's",
        machinery=True,
    )
    class_names: str = option(
        "",
        "text file of class names for the task zeroshot, one per line in the order of the class"
        " folders; imagenet: open_clip's; empty: the folders' names",
        machinery=True,
    )
    templates: str = option(
        "",
        "text file of prompts for the task zeroshot, one per line with {} for the class name;"
        " empty: open_clip's 80",
        machinery=True,
    )
    cache: str = option(
        "",
        "folder of cached features, or none; empty: features in $UNIC_DS_CACHE or ~/.cache/unic_ds",
        machinery=True,
    )
    max_train: int = option(
        50_000,
        "most training images of a task after training; 0: all, as `unic-ds eval` takes unless this"
        " is given",
        machinery=True,
    )
    max_val: int = option(
        10_000, "most validation images of a task, as eval.max_train", machinery=True
    )
    batch: int = option(64, "images per forward of a rank", machinery=True, most=1_000_000)

    def __post_init__(self) -> None:
        check_most(self, "eval.")
        for key in ("temperature", "batch"):
            check(getattr(self, key) > 0, f"eval.{key}", "positive", getattr(self, key))
        for key in ("max_train", "max_val", "head_images"):
            check(getattr(self, key) >= 0, f"eval.{key}", ">= 0", getattr(self, key))
        check(all(0 < k <= 1_000_000 for k in self.k), "eval.k", "from 1 to 1,000,000", self.k)
        check(0 <= self.size <= MOST_PIXELS, "eval.size", f"from 0 to {MOST_PIXELS}", self.size)
        sizes = all(0 < size <= MOST_PIXELS for size in self.sizes)
        check(sizes, "eval.sizes", f"from 1 to {MOST_PIXELS}", self.sizes)

    @property
    def rules(self) -> EvalProtocol:
        """The protocol's rules."""
        return PROTOCOLS[self.protocol]

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Numbers of neighbours of kNN."""
        return self.k or self.rules.k


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Probes of the student during training: values in the log, by which checkpoints are kept."""

    every: int = option(
        0,
        "steps between probes of the student, averaged if optim.ema; 0: off. Training is the same"
        " with and without, and waits for each",
        machinery=True,
    )
    tasks: tuple[str, ...] = option(
        ("knn", "teacher", "rankme"), f"tasks, of {', '.join(PROBES)}", machinery=True
    )
    data: str = option(
        "",
        "folder of class folders, with train/ and val/ or to be split; empty: the run's own images",
        machinery=True,
    )
    images: int = option(
        2000,
        "most training and most validation images, drawn by the seed; the same in each probe",
        machinery=True,
    )
    pictures: int = option(
        8,
        "fixed images whose features are drawn at each probe and at the end, in OUT/pictures; 0: no"
        " pictures",
        machinery=True,
        most=32,
    )

    def __post_init__(self) -> None:
        check_most(self, "probe.")
        check(self.every >= 0, "probe.every", ">= 0", self.every)
        check(self.pictures >= 0, "probe.pictures", ">= 0", self.pictures)
        check(self.images > 0, "probe.images", "positive", self.images)
        check(bool(self.tasks), "probe.tasks", "at least one task", "none")

    def check_best_by(self, best_by: str) -> None:
        """Raise ValueError unless `run.best_by` is the loss or a value that probes measure."""
        if best_by == "loss":
            return
        task = best_by.removeprefix("probe/").split(" ")[0]
        known = best_by.startswith("probe/") and task in self.tasks and self.every > 0
        names = ", ".join(f"probe/{name}" for name in self.tasks)
        want = f"loss or, with --probe.every, a value of probe.tasks ({names})"
        check(known, "run.best_by", want, best_by)
