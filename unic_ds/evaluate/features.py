"""Models and image sets as evaluators see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.evaluate.comparison import Role
from unic_ds.tokens import Tokens

ModelOutput = Literal["cls", "patch", "projection"]
Annotation = Literal["labels", "masks", "boxes", "depth", "keypoints"]
FILLER = -1
"""Place of an image that is encoded but not counted."""


class Outputs(NamedTuple):
    """Features of an image batch by one model, as far as they were asked for."""

    cls_BC: Tensor | None = None
    patch_BNC: Tensor | None = None
    projection: Mapping[str, Tokens] | None = None
    """Tokens in the feature space of each teacher, by the teacher's name, on the student's grid.

    A student's are predictions of its ladder with the standardisation undone, a teacher's are its
    own tokens under its own name.
    """


@dataclass(frozen=True)
class Model:
    """A frozen encoder under evaluation."""

    name: str
    size: int
    """Side of its images in pixels."""
    outputs: frozenset[ModelOutput]
    encode: Callable[[Tensor, frozenset[ModelOutput]], Outputs]
    """Takes uint8 images (B, 3, size, size) on the device, and what is needed of `outputs`.

    Square images only; patch tokens come in rows from the top left. It keeps no graph for
    gradients.
    """
    role: Role = "teacher"
    identity: str = ""
    """Hash of weights, preprocessing and precision; empty: its features are not cached."""
    at: Callable[[int], Model] | None = None
    """Builds the same model for another side, a multiple of `patch`; None: it has one side."""
    patch: int = 0
    """Pixels that a patch token covers; 0: unknown."""
    frees: Callable[[], None] | None = None
    """Frees the memory of a model that `at` or `pruned` has built."""
    pruned: Callable[[float], Model] | None = None
    """Builds the same model with this share of its weights set to zero (`utility.pruned_copy`).

    None: it has no weights, or they are not at hand.
    """


class EvalBatch(NamedTuple):
    """Images of one rank, and what is known of them."""

    images: Mapping[int, Tensor]
    """Side in pixels -> uint8 B3HW on the device."""
    place_B: NDArray[np.int64]
    """Place of each image in its set; FILLER: not to be counted."""
    annotations: Mapping[Annotation, Any]
    """One entry an image under each name: `labels` are int64 (B), -1 without a class."""


@runtime_checkable
class ImageSet(Protocol):
    """Images that are dealt to the ranks: each place is counted on exactly one."""

    @property
    def annotations(self) -> frozenset[Annotation]:
        """Kinds of annotation that its batches bring."""

    @property
    def name(self) -> str:
        """Name of the set in the table, such as its folder's."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that `labels` count; empty if there are none."""

    @property
    def identity(self) -> str:
        """Hash of the images and how they are read; empty: features of it are not cached."""

    def __len__(self) -> int:
        """Number of images on all ranks together."""

    def labels(self) -> NDArray[np.int64]:
        """The class of each image (N), -1 for none; the same on every rank."""

    def file_name(self, place: int) -> str:
        """Path of an image below the set's folder."""

    def batches(
        self, sizes: Sequence[int], only: NDArray[np.int64] | None = None
    ) -> Iterator[EvalBatch]:
        """This rank's images once, without augmentation; `only`: those at these places.

        Equally many batches on every rank, filled up by fillers: a model may have collectives.
        """


@runtime_checkable
class AugmentedImages(Protocol):
    """Further method of an image set that also shows augmented views."""

    def augmented(self, sizes: Sequence[int], *, epoch: int, seed: int) -> Iterator[EvalBatch]:
        """This rank's images once, by a random resized crop and flip of its own in each epoch."""


class TextTower(Protocol):
    """The text side of a CLIP or SigLIP teacher, and its projection of image features."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (M, E) of texts, fp32 on the device."""

    def project(self, cls_BC: Tensor) -> Tensor:
        """Embeddings (B, E) of the teacher's summary tokens, not normalised."""


class Classifier(Protocol):
    """A teacher's own classifier."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of token that it reads (`tokens.KINDS`)."""

    def logits(self, tokens: Tokens) -> Tensor:
        """Logits (B, L) of the teacher's tokens."""


def deal(count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Places of this rank's images, of `count` that are dealt in turn, and a mask of the counted.

    Equally many on every rank: the last may be one that another rank counts.
    """
    dealt_R = np.arange(dist.rank(), -(-count // dist.world()) * dist.world(), dist.world())
    return dealt_R % max(count, 1), dealt_R < count


@dataclass(frozen=True)
class FeatureSet:
    """CLS features of the images that this rank counts, on the CPU."""

    cls: Mapping[str, Tensor]
    """Model -> fp32 features (R, C)."""
    place_R: Tensor
    """Places of the rows among all N, ascending."""
    label_N: Tensor
    """Labels of all images, on every rank; -1 for one without a class or that was not read."""

    @property
    def label_R(self) -> Tensor:
        """Labels of this rank's rows."""
        return self.label_N[self.place_R]

    def labelled(self) -> FeatureSet:
        """The images with a label alone, numbered anew."""
        has_N, has_R = self.label_N >= 0, self.label_R >= 0
        return FeatureSet(
            {name: rows_RC[has_R] for name, rows_RC in self.cls.items()},
            (has_N.cumsum(0) - 1)[self.place_R[has_R]],
            self.label_N[has_N],
        )


def pixels(image_B3HW: Tensor, size: int = 16) -> Tensor:
    """The baseline without a model: grey thumbnails scaled to [-1, 1], (B, size * size) fp32."""
    grey_B1HW = image_B3HW.float().mean(1, keepdim=True)
    small_B1HW = F.interpolate(grey_B1HW, (size, size), mode="bilinear", antialias=True)
    return small_B1HW.flatten(1) / 127.5 - 1


def pixels_model(size: int) -> Model:
    """The baseline `pixels` on images of `size` px."""

    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        return Outputs(pixels(image_B3HW))

    return Model("pixels", size, frozenset({"cls"}), encode, "baseline", identity="pixels 16")
