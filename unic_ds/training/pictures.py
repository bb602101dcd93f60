"""Pictures that a run makes by itself: PCA maps, nearest neighbours and augmented images.

Every rank encodes the few images, since a teacher may have collectives; rank 0 draws. A picture
that cannot be made ends no run: a line says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from unic_ds import data, dist
from unic_ds.evaluate import neighbours, pca_maps
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import ImageSet, Model, ModelOutput
from unic_ds.evaluate.neighbours import Nearest
from unic_ds.evaluate.pca_maps import Basis
from unic_ds.evaluate.picture_grids import Cell, Grid, Pixels, Row
from unic_ds.harness.image_sets import SampledImages
from unic_ds.process import entry_point
from unic_ds.training.attempts import Attempts
from unic_ds.training.picture_folder import Kind, PictureFolder
from unic_ds.training.run_log import RunLog
from unic_ds.training.state import RunContext, TrainState

STUDENT = "student"
SIDE, THUMBNAIL = 112, 60
"""Pixels of an image beside PCA maps, and of a neighbour; 112 is a multiple of usual grids."""
QUERIES, NEAREST = 6, 5
AUGMENTED = 16
"""Images of the first batch that are shown."""
PER_ROW = 8
AS = f"{STUDENT} as "

CAPTION_OF_PCA = (
    "Red, green and blue are the first three principal components of the patch tokens; a square is"
    " a token, at the model's own resolution. Tokens are centred by their mean over all of these"
    " images and not scaled; each colour spans the 1st to the 99th percentile. A teacher's basis is"
    " fitted once in a run, so its row stays. The student's is fitted anew in each picture, in the"
    " order and with the signs of the one before; the share of the variance is that of all three."
    " 'student as T' are the student's predictions of T's features, in T's basis and colours: the"
    " better they are, the more this row is like that of T."
)
CAPTION_OF_NEIGHBOURS = (
    "Left an unseen image, right the {k} training images of highest cosine of CLS features, nearest"
    " first, of {count} training images. A blue frame: the same class; orange: another one."
)
CAPTION_OF_AUGMENTED = (
    "The first {count} images that rank 0 trains on, after --data.augment {augment}, at the"
    " student's {size} px; the teachers get the same views at their own sizes."
)

Patches = dict[str, Tensor]
"""Patch tokens (B, N, C) of the fixed images, on the CPU, by the name of their row."""


@dataclass
class Pictures:
    """Pictures of one start; every rank has them, and calls `draw` together with the others."""

    run: RunContext
    state: TrainState
    log: RunLog
    nearest: dict[str, Nearest] = field(default_factory=dict)
    """By model; a teacher's stay for the whole start."""
    bank: tuple[ImageSet, ImageSet] | None = None
    """The training and validation images of `nearest`."""
    small: tuple[dict[int, Pixels], dict[int, Pixels]] = field(default_factory=lambda: ({}, {}))
    """The images of `bank` that were read, by their place."""
    images: dict[int, Tensor] = field(default_factory=dict)
    """The fixed images by side, uint8 B3HW on the CPU; the same on every rank."""
    attempts: Attempts = field(
        default_factory=lambda: Attempts("a picture is missing, which ends no run")
    )

    def __post_init__(self) -> None:
        if self.count:
            self.attempts.here(lambda: self.folder.drop_after(self.state.step))

    @property
    def count(self) -> int:
        """Number of fixed images."""
        return self.run.cfg.probe.pictures

    @cached_property
    def folder(self) -> PictureFolder:
        """The folder of the pictures."""
        return PictureFolder(self.run.out)

    def find_neighbours(self, found: EvalData, models: Sequence[Model]) -> None:
        """Find the nearest training images of each model by features that were taken already."""
        shown = [m for m in models if is_shown(m) and neighbours.has_features(m, found)]
        if not self.count or not shown:
            return
        self.bank = found.train, found.val
        queries = neighbours.chosen(found.val, QUERIES, self.run.cfg.seed)

        def find() -> None:
            for model in shown:
                self.nearest[row_name(model)] = neighbours.find(model, found, queries, k=NEAREST)

        if not self.attempts.on_all_ranks(find):
            self.bank = None

    def draw(self, models: Sequence[Model]) -> None:
        """Draw the PCA maps and the neighbours of a student and its teachers at this step."""
        if not self.count:
            return
        shown, tokens = [model for model in models if is_shown(model)], Patches()
        if self.attempts.on_all_ranks(lambda: tokens.update(self.encode(shown))):
            self.attempts.here(lambda: self.draw_pca(tokens))
        if self.bank and self.attempts.on_all_ranks(self.read_thumbnails):
            self.attempts.here(self.draw_neighbours)

    def encode(self, models: Sequence[Model]) -> Patches:
        """Patch tokens of the fixed images by each model, and a student's predictions."""
        found = Patches()
        if not self.images:
            self.images = self.read_images({SIDE, *(model.size for model in models)})
        for model in models:
            wanted: set[ModelOutput] = {"patch", "projection"} if is_student(model) else {"patch"}
            with torch.no_grad():
                image_B3HW = self.images[model.size].to(dist.device())
                outputs = model.encode(image_B3HW, model.outputs & wanted)
            if outputs.patch_BNC is not None:
                found[row_name(model)] = outputs.patch_BNC.float().cpu()
            for teacher, pred in (outputs.projection or {}).items():
                if pred.patch_BNC.numel():
                    found[AS + teacher] = pred.patch_BNC.float().cpu()
        return found

    def read_images(self, sides: set[int]) -> dict[int, Tensor]:
        """The fixed images at some sides, which rank 0 reads for all; ValueError if it cannot."""
        cfg, source = self.run.cfg, self.run.val or self.run.train
        sample = SampledImages(source, cfg, self.count, labelled=False)

        def read() -> dict[int, Tensor]:
            batches = data.passes(
                source,
                replace(cfg.data, bad_limit=1.0),
                sizes=tuple(sorted(sides)),
                batch=len(sample),
                indices=sample.chosen_N,
                device=torch.device("cpu"),
            )
            try:
                return next(iter(batches)).images
            except Exception as error:  # for all ranks to get its text
                raise ValueError(entry_point.summary(error)) from error

        return dist.on_rank_0(read)

    def draw_pca(self, tokens: Patches) -> None:
        """Draw the first three principal components of patch tokens, with the stored bases."""
        finite = {name: x for name, x in tokens.items() if x.isfinite().all()}
        bases, images_BHW3 = self.bases(finite), self.images[SIDE].permute(0, 2, 3, 1).numpy()
        rows = [Row(["images"], [Cell(image) for image in images_BHW3])]
        for name in sorted(finite, key=order_of(list(finite))):
            patch_BNC = finite[name]
            if basis := bases.get(name.removeprefix(AS)):
                maps_BGG3 = pca_maps.to_map(basis.colours(patch_BNC)).numpy()
                label = label_of(name, basis, side=maps_BGG3.shape[1])
                rows.append(Row(label, [Cell(map_GG3) for map_GG3 in maps_BGG3]))
        teachers = [row.name for row in self.run.cfg.teachers]
        absent = [name for name in teachers if name not in tokens]
        broken = [name for name in tokens if name not in finite]
        caption = caption_of_pca(bases, absent=absent, broken=broken)
        title = f"PCA of patch features after step {self.state.step}"
        self.publish("pca", Grid(title, caption, [rows], SIDE), step=self.state.step)

    def bases(self, tokens: Patches) -> dict[str, Basis]:
        """The basis of each model: a teacher's as stored, the student's fitted anew and aligned."""
        state, found = self.folder.bases(), dict[str, Basis]()
        for name, patch_BNC in tokens.items():
            if name.startswith(AS):
                continue
            stored = Basis.read(state, f"{name}/", width=patch_BNC.shape[-1])
            if stored and name != STUDENT:
                found[name] = stored
                continue
            fitted = pca_maps.fit(patch_BNC)
            found[name] = pca_maps.aligned(fitted, stored, patch_BNC) if stored else fitted
        for name, basis in found.items():
            state |= basis.state_dict(f"{name}/")
        self.folder.store_bases(state)
        return found

    def read_thumbnails(self) -> None:
        """Read the images of the neighbours that were found and not read before."""
        assert self.bank
        needed = [set[int](), set[int]()]
        for by_query in self.nearest.values():
            needed[0].update(place for found in by_query.values() for place in found)
            needed[1].update(by_query)
        for images, places, known in zip(self.bank, needed, self.small, strict=True):
            if new := places - known.keys():
                known.update(neighbours.thumbnails(images, new, THUMBNAIL))

    def draw_neighbours(self) -> None:
        """Draw a block for each query, with a row for each model."""
        assert self.bank
        (train, val), (small_train, small_val) = self.bank, self.small
        train_labels, val_labels = train.labels(), val.labels()
        blocks = []
        for query in sorted({place for found in self.nearest.values() for place in found}):
            label = int(val_labels[query])
            rows: list[Row] = []
            for name, by_query in self.nearest.items():
                first = None if rows else cell_of(small_val.get(query), val, label)
                near = [
                    cell_of(small_train.get(at), train, int(train_labels[at]), beside=label)
                    for at in by_query.get(query, [])
                ]
                rows.append(Row([name], [first, *near]))
            blocks.append(rows)
        caption = CAPTION_OF_NEIGHBOURS.format(k=NEAREST, count=len(train))
        title = f"Nearest training images after step {self.state.step}"
        grid = Grid(title, caption, blocks, THUMBNAIL, columns=2, label_width=104)
        self.publish("neighbours", grid, step=self.state.step)

    def draw_augmented(self) -> None:
        """Draw the first micro batch as training saw it, once a run; rank 0 alone does."""
        image_B3HW = self.run.first_images.take()
        if image_B3HW is not None and self.count:
            self.attempts.here(lambda: self.draw_batch(image_B3HW))

    def draw_batch(self, image_B3HW: Tensor) -> None:
        """Draw augmented images, unless the run has such a picture already."""
        if self.folder.has("augmented"):
            return
        cells = [Cell(image) for image in image_B3HW.permute(0, 2, 3, 1).cpu().numpy()]
        rows = [Row([], cells[at : at + PER_ROW]) for at in range(0, len(cells), PER_ROW)]
        size, augment = image_B3HW.shape[-1], self.run.cfg.data.augment
        caption = CAPTION_OF_AUGMENTED.format(count=len(cells), size=size, augment=augment)
        grid = Grid("Images as the student sees them", caption, [rows], SIDE, label_width=0)
        self.publish("augmented", grid, step=self.run.phases.first_step)

    def publish(self, kind: Kind, grid: Grid, *, step: int) -> None:
        """Write a picture to the folder and the trackers."""
        image = grid.draw()
        self.folder.add(kind, image, step=step, title=grid.title, caption=grid.caption)
        self.log.picture(f"pictures/{kind}", image, caption=grid.caption, step=step)


def is_student(model: Model) -> bool:
    """True for the student that is trained, or was."""
    return model.role == "student"


def is_shown(model: Model) -> bool:
    """True for the student and the teachers: baselines are not shown."""
    return model.role in ("student", "teacher")


def row_name(model: Model) -> str:
    """Name of a model in the pictures."""
    if is_student(model):
        return STUDENT
    return f"{model.name} (teacher)" if model.name == STUDENT else model.name


def order_of(names: Sequence[str]) -> Callable[[str], tuple[int, bool]]:
    """Sort key of rows: a teacher, the student's predictions of it, the next; the student last."""
    places = {name: len(names) if name == STUDENT else at for at, name in enumerate(names)}
    return lambda name: (places.get(name.removeprefix(AS), 0), name.startswith(AS))


def label_of(name: str, basis: Basis, *, side: int) -> list[str]:
    """Lines beside a row of PCA maps."""
    tokens = f"{side} x {side} tokens"
    if name.startswith(AS):
        return [STUDENT, f"as {name.removeprefix(AS)}", tokens]
    return [name, tokens, f"{100 * float(basis.share_D.sum()):.0f} % of variance"]


def cell_of(
    image: Pixels | None, images: ImageSet, label: int, *, beside: int | None = None
) -> Cell | None:
    """An image with the name of its class, framed by its class and that of the one `beside`.

    None for an image that could not be read; a label is -1 without a class.
    """
    if image is None:
        return None
    name = images.classes[label] if 0 <= label < len(images.classes) else ""
    if beside is None or min(label, beside) < 0:
        return Cell(image, name)
    return Cell(image, name, "same" if label == beside else "other")


def caption_of_pca(
    bases: Mapping[str, Basis], *, absent: Sequence[str], broken: Sequence[str]
) -> str:
    """Text that says how the PCA was made, and which models it lacks."""
    fitted = [
        f"{name} {basis.fitted_2[0]:.0f} images, {basis.fitted_2[1]:.0f} tokens"
        for name, basis in bases.items()
    ]
    text = [f"{CAPTION_OF_PCA} Fitted to: {'; '.join(fitted)}."]
    if absent:
        text.append(f"Not shown, since their features come from a cache: {', '.join(absent)}.")
    if broken:
        text.append(f"Not shown, since their features are NaN or infinite: {', '.join(broken)}.")
    return " ".join(text)
