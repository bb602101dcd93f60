"""Image sets of the data room for evaluators: squares, read once, divided among the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from unic_ds import config, data, dist, rng
from unic_ds.data import Source
from unic_ds.evaluate import features
from unic_ds.evaluate.features import Annotation, EvalBatch
from unic_ds.process import console


def find_images(cfg: config.Config) -> tuple[Source, Source | None]:
    """Training and validation images of a run (None if there are none), the same on every rank."""
    train, val = sources_of(cfg, scan)
    if cfg.data.val_share:
        train, val = data.split(train, cfg.data.val_share, cfg.seed)
    return train, val


def sources_of(
    cfg: config.Config, scan: Callable[[str], Source] = data.scan
) -> tuple[Source, Source | None]:
    """Sources of --data.train and --data.val (None if not given), on this rank."""
    train = scan(cfg.data.train)
    return train, scan(cfg.data.val).relabelled(train.classes) if cfg.data.val else None


def scan(spec: str) -> Source:
    """The images of a folder, shards or a list, the same on every rank; errors as `data.scan`.

    RuntimeError if the ranks find different images.
    """
    with dist.local_main_first():  # the first builds an index where there is none
        source = data.scan(spec)
    assert_same_on_all_ranks(source.fingerprint())
    return source


def can_evaluate(train: Source, val: Source | None) -> bool:
    """True if both splits have images of two classes or more, and a class in common."""
    if val is None:
        return False
    classes, held_out = (set(s.label_N[s.label_N >= 0].tolist()) for s in (train, val))
    return min(len(classes), len(held_out)) > 1 and bool(classes & held_out)


def assert_same_on_all_ranks(fingerprint: str) -> None:
    """RuntimeError unless every rank found the same images, which determine the data order."""
    if len(set(dist.all_gather_objects(fingerprint))) > 1:
        raise RuntimeError("the ranks found different images; wait until the folder is complete")


class SampledImages:
    """A seeded sample of a source's images, divided among the ranks (`features.ImageSet`).

    An image that cannot be read is left out; ValueError for too many of them.
    """

    def __init__(
        self,
        source: Source,
        cfg: config.Config,
        limit: int = 0,
        *,
        labelled: bool = True,
        name: str = "",
        balanced: bool = False,
    ):
        """Choose at most `limit` images (0: all), of those with a label if `labelled`.

        `balanced`: equally many of each class, as far as there are.
        """
        bits_N = rng.random_bits(cfg.seed, "probe", 1, np.arange(len(source)))[:, 0]
        order_N = np.argsort(bits_N, kind="stable")
        if labelled:
            order_N = order_N[source.label_N[order_N] >= 0]
        if balanced:
            order_N = order_N[turns(source.label_N[order_N])]
        self.source, self.cfg, self.name = source, cfg, name or source.folder.name
        self.chosen_N = np.sort(order_N[: limit or None])
        self.annotations: frozenset[Annotation] = frozenset({"labels"} if labelled else ())
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.chosen_N)

    @cached_property
    def identity(self) -> str:
        """Hash of the images' names, sizes and times, and of how they are decoded.

        Every rank asks for it; rank 0 looks at the files.
        """
        versions = dist.on_rank_0(lambda: self.source.versions(self.chosen_N))
        found = [self.source.fingerprint(), versions, self.chosen_N.tobytes().hex()]
        return hashlib.sha256("\n".join([*found, self.decoding()]).encode()).hexdigest()

    def decoding(self) -> str:
        """The decoder, the crop and the limits, on which the images that are read depend."""
        cfg = self.cfg.data
        limits = f"{cfg.max_mb:g} MB {cfg.max_megapixels:g} megapixels"
        crop = f"crop {self.cfg.eval.rules.crop:g}"
        return f"{data.backend(cfg)} {dist.device().type} {crop} {limits}"

    def labels(self) -> NDArray[np.int64]:
        """The class of each image (N), -1 for none."""
        return self.source.label_N[self.chosen_N].astype(np.int64)

    def file_name(self, place: int) -> str:
        """Path of an image below the set's folder."""
        return self.source.names[int(self.chosen_N[place])]

    def batches(
        self, sizes: Sequence[int], only: NDArray[np.int64] | None = None
    ) -> Iterator[EvalBatch]:
        """This rank's images once, as central squares; `only`: those at these places."""
        crop = self.cfg.eval.rules.crop
        resized = {side: round(side / crop) for side in dict.fromkeys(sizes)}
        places_N = np.arange(len(self)) if only is None else only
        for batch in self.shown(tuple(resized.values()), places_N):
            images = {}
            for side, larger in resized.items():
                at_side = (larger - side) // 2
                middle = slice(at_side, at_side + side)
                images[side] = batch.images[larger][..., middle, middle]
            yield batch._replace(images=images)

    def augmented(self, sizes: Sequence[int], *, epoch: int, seed: int) -> Iterator[EvalBatch]:
        """This rank's images once, by torchvision's random resized crop and flip of an epoch."""
        yield from self.shown(tuple(sizes), np.arange(len(self)), view=epoch, seed=seed)

    def shown(
        self,
        sides: tuple[int, ...],
        places_N: NDArray[np.int64],
        *,
        view: int | None = None,
        seed: int = 0,
    ) -> Iterator[EvalBatch]:
        """This rank's images at some places once, augmented in a `view`."""
        dealt_R, counted_R = features.deal(len(places_N))
        place_R = places_N[dealt_R]
        size = self.cfg.eval.batch
        batches = data.passes(
            self.source,
            self.cfg.data if view is None else cropped(self.cfg.data),
            sizes=tuple(dict.fromkeys(sides)),
            batch=size,
            indices=self.chosen_N[place_R],
            device=dist.device(),
            view=view,
            seed=seed,
        )
        total = -(-len(place_R) // size)
        for at, batch in enumerate(console.track(batches, total, "encoding images")):
            here = slice(at * size, (at + 1) * size)
            # A broken image is replaced by its neighbour, which must not count twice.
            read_B = batch.index_B == self.chosen_N[place_R[here]]
            place_B = np.where(counted_R[here] & read_B, place_R[here], features.FILLER)
            labels = self.source.label_N[batch.index_B]
            yield EvalBatch(batch.images, place_B, {"labels": labels})


def turns(label_N: NDArray[np.int32]) -> NDArray[np.int64]:
    """Order in which classes take turns: the first image of each class, then each second one."""
    by_class_N = np.argsort(label_N, kind="stable")
    count_L = np.unique(label_N, return_counts=True)[1]
    start_L = np.cumsum(count_L) - count_L
    turn_N = np.empty(len(label_N), dtype=np.int64)
    turn_N[by_class_N] = np.arange(len(label_N)) - np.repeat(start_L, count_L)
    return np.argsort(turn_N, kind="stable")


def cropped(cfg: config.Data) -> config.Data:
    """The options with the augmentation of a linear probe: a random resized crop and a flip."""
    usual = config.Data()  # of torchvision, whatever the run's
    return replace(
        cfg, augment="weak", crop_min=usual.crop_min, ratio_max=usual.ratio_max, flip=usual.flip
    )
