"""COCO's average precision of boxes and masks, by the library faster-coco-eval."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Truth(NamedTuple):
    """The instances of an image."""

    height: int
    width: int
    box_M4: NDArray[np.float32]
    class_M: NDArray[np.int64]
    crowd_M: NDArray[np.bool_]
    rles: tuple[bytes, ...] | None
    """Compressed run lengths of the masks."""


class Found(NamedTuple):
    """Detections in an image, at its own size."""

    box_D4: NDArray[np.float32]
    class_D: NDArray[np.int64]
    score_D: NDArray[np.float32]
    rles: tuple[bytes, ...] | None


Kind = Literal["bbox", "segm"]


class Entry(TypedDict, total=False):
    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    score: float
    segmentation: dict[str, object]


"""An annotation, or a detection, as COCO's JSON has it."""


def library() -> ModuleType:
    """The optional library; RuntimeError with the remedy if it is not installed."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise RuntimeError(
            f"detection needs faster-coco-eval ({error}); pip install -e '.[eval]'"
        ) from error
    return faster_coco_eval


def average_precision(
    truth: Sequence[Truth], found: Sequence[Found], *, classes: int, kind: Kind
) -> tuple[float, float]:
    """AP at IoU 0.5 to 0.95 and AP at 0.5, both in %, over images in the same order.

    ValueError if no image has an object that is not a crowd.
    """
    coco = library()
    objects = coco.COCO(dataset(truth, classes, kind))
    results = objects.loadRes(entries(truth, found, kind))
    scores = coco.COCOeval_faster(objects, results, kind, print_function=lambda *_: None)
    scores.evaluate()
    scores.accumulate()
    scores.summarize()
    if scores.stats[0] < 0:
        raise ValueError("the validation images of the task detection have no object; add some")
    return 100 * float(scores.stats[0]), 100 * float(scores.stats[1])


def dataset(truth: Sequence[Truth], classes: int, kind: Kind) -> dict[str, list[object]]:
    """The instances as COCO's JSON; identifiers begin at 1."""
    images = [
        {"id": at, "height": image.height, "width": image.width} for at, image in enumerate(truth)
    ]
    annotations: list[object] = []
    for at, image in enumerate(truth):
        for place, box_4 in enumerate(image.box_M4):
            entry = new_entry(at, box_4, image.class_M[place])
            entry |= {"id": len(annotations) + 1, "iscrowd": int(image.crowd_M[place])}
            if kind == "segm":
                entry["segmentation"] = mask_of(image, image.rles, place)
            annotations.append(entry)
    categories = [{"id": at, "name": str(at)} for at in range(classes)]
    return {"images": [*images], "annotations": annotations, "categories": [*categories]}


def entries(truth: Sequence[Truth], found: Sequence[Found], kind: Kind) -> list[Entry]:
    """The detections as COCO's result file has them."""
    rows: list[Entry] = []
    for at, (image, one) in enumerate(zip(truth, found, strict=True)):
        for place, box_4 in enumerate(one.box_D4):
            entry = new_entry(at, box_4, one.class_D[place])
            entry["score"] = float(one.score_D[place])
            if kind == "segm":
                entry["segmentation"] = mask_of(image, one.rles, place)
            rows.append(entry)
    return rows


def new_entry(image: int, box_4: NDArray[np.float32], label: np.int64) -> Entry:
    """A box of an image, as x, y, width, height."""
    x0, y0, x1, y1 = map(float, box_4)
    box = [x0, y0, x1 - x0, y1 - y0]
    return {"image_id": image, "category_id": int(label), "bbox": box, "area": box[2] * box[3]}


def mask_of(image: Truth, rles: tuple[bytes, ...] | None, place: int) -> dict[str, object]:
    """A mask as COCO's JSON has it."""
    assert rles is not None, "the samples have no masks"
    return {"size": [image.height, image.width], "counts": rles[place]}


def compressed(mask_MHW: Tensor) -> tuple[bytes, ...]:
    """Run lengths of masks on the CPU, in COCO's order: down the columns."""
    mask_HWM = np.asfortranarray(mask_MHW.permute(1, 2, 0).numpy().astype(np.uint8))
    return tuple(rle["counts"] for rle in library().mask.encode(mask_HWM))
