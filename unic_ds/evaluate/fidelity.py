"""Agreement of a student's predictions with the features of each of its teachers; needs no labels.

Per teacher and kind of token: fidelity, the teacher's variance divided by the mean squared error
(RADIOv2.5, arXiv 2412.07679); cosine and smooth-L1 of standardised features, as in the loss
(UNIC, arXiv 2408.05088, section 3); and linear CKA (arXiv 1905.00414) by the unbiased estimator of
HSIC (Song et al., JMLR 13, 2012), which is 0 on average for independent features however few the
tokens are. Sums are fp64 and over all tokens of all ranks: no number depends on the batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.evaluate.comparison import Better, Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import FILLER, Annotation, EvalBatch, ImageSet, Model, ModelOutput
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.tokens import KINDS, Tokens, to_grid

MOST = 1e6
"""Fidelity of a prediction without an error, which fp32 features cannot tell from a larger one."""
FITTED = 512
"""Images that the mean and deviation of a teacher's channels are fitted to."""
STD_FLOOR = 0.1
"""Least deviation, as a part of the teacher's median: the default of `standardise.std_floor`."""
ROWS = 2048
"""Tokens that are multiplied at once."""
CKA_TOKENS = 16
"""Tokens of an image that CKA takes at most, evenly spaced: its products cost C^2 a token."""
REMEDY = "lower --eval.batch"
PROJECTION: frozenset[ModelOutput] = frozenset({"projection"})

MEASURES: dict[str, Better] = {
    "fidelity": "higher",
    "cosine": "higher",
    "smooth-l1": "lower",
    "cka": "higher",
}
PROTOCOLS = {
    "fidelity": "variance / mean squared error of raw features",
    "cosine": "cosine of features standardised on {fitted} images",
    "smooth-l1": "smooth-L1 (beta 1) of features standardised on {fitted} images",
    "cka": f"linear CKA, unbiased HSIC, of raw features, at most {CKA_TOKENS} tokens an image",
}


class Pair(NamedTuple):
    """A student's prediction of a teacher's tokens of one kind."""

    student: str
    teacher: str
    kind: str


class Scale(NamedTuple):
    """Mean and deviation of a teacher's channels, for one kind of token."""

    mean_C: Tensor
    std_C: Tensor


Scales = Mapping[tuple[str, str], Scale]
"""(teacher, kind of token) -> its scale."""


class Fidelity:
    """Agreement of students with the teachers among the models."""

    model_needs: frozenset[ModelOutput] = PROJECTION
    data_needs: frozenset[Annotation] = frozenset()

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `teacher NAME KIND MEASURE` of each student, for teachers of the same name."""
        fitted = min(FITTED, len(data.val))
        for pair, sums in agreements(models, data.val).items():
            for measure, value in sums.measures().items():
                rule = PROTOCOLS[measure].format(fitted=fitted)
                used = f"{sums.images} images {sums.size} px"
                yield Score(
                    pair.student,
                    f"teacher {pair.teacher} {pair.kind} {measure}",
                    value,
                    f"teacher {measure}: {rule} {used}",
                    unit="",
                    better=MEASURES[measure],
                )


@dataclass
class Sums:
    """Sums over tokens of a teacher's features t and a student's prediction p, both less a mean.

    `gram_ZZ` is that of the rows [t, p, |t|^2, |p|^2, 1] of some of the tokens, so it has every sum
    that HSIC takes.
    """

    gram_ZZ: Tensor
    """fp64, Z = 2 C + 3; 0 x 0 without CKA."""
    sum_C: Tensor
    """fp64 sum of t."""
    sum_5: Tensor
    """fp64 sums: tokens, cosine, smooth-L1 (mean over channels), squared error, |t|^2."""
    size: int
    """Side of the student's images."""
    images: int = 0

    def add(self, target_NC: Tensor, pred_NC: Tensor, scale: Scale, *, per_image: int) -> None:
        """Add tokens of this rank's images, each of `per_image` tokens."""
        place_N = torch.arange(len(target_NC), device=target_NC.device) % per_image
        chosen_N = place_N % -(-per_image // CKA_TOKENS) == 0
        parts = (x.split(ROWS) for x in (target_NC, pred_NC, chosen_N))
        for target_nC, pred_nC, chosen_n in zip(*parts, strict=True):
            target_nC, pred_nC = (x_nC.double() - scale.mean_C for x_nC in (target_nC, pred_nC))
            error_nC = pred_nC - target_nC
            y_nC, z_nC = target_nC / scale.std_C, pred_nC / scale.std_C
            near_nC = F.smooth_l1_loss(z_nC, y_nC, reduction="none")
            ones_n, square_n = torch.ones_like(y_nC[:, 0]), target_nC.square().sum(1)
            error_n, cosine_n = error_nC.square().sum(1), F.cosine_similarity(y_nC, z_nC)
            values = ones_n, cosine_n, near_nC.mean(1), error_n, square_n
            self.sum_5 += torch.stack(values).sum(1)
            self.sum_C += target_nC.sum(0)
            if len(self.gram_ZZ):
                norms = [x_nC.square().sum(1, keepdim=True) for x_nC in (target_nC, pred_nC)]
                row_nZ = torch.cat([target_nC, pred_nC, *norms, ones_n[:, None]], 1)[chosen_n]
                self.gram_ZZ.addmm_(row_nZ.T, row_nZ)

    def reduced(self) -> Sums:
        """The sums over all ranks; every rank calls it."""
        count = dist.all_reduce_sum(torch.tensor(self.images))
        gram_ZZ, sum_C, sum_5 = map(dist.all_reduce_sum, (self.gram_ZZ, self.sum_C, self.sum_5))
        return Sums(gram_ZZ.cpu(), sum_C.cpu(), sum_5.cpu(), self.size, int(count))

    def measures(self) -> dict[str, float]:
        """Each of `MEASURES`."""
        count = float(self.sum_5[0])
        _, cosine, smooth_l1, error, square = (self.sum_5 / count).tolist()
        variance = square - float((self.sum_C / count).square().sum())
        fidelity = variance / error if error * MOST > variance else MOST
        return {
            "fidelity": fidelity,
            "cosine": cosine,
            "smooth-l1": smooth_l1,
            "cka": linear_cka(self.gram_ZZ) if len(self.gram_ZZ) else math.nan,
        }


def linear_cka(gram_ZZ: Tensor) -> float:
    """Linear CKA of t and p by the Gram matrix of `Sums`; NaN for fewer than 4 tokens.

    At most 1 for equal features, about 0 for independent ones, of which it may be negative.
    """
    both = hsic(gram_ZZ, 0, 1)
    alone = hsic(gram_ZZ, 0, 0) * hsic(gram_ZZ, 1, 1)
    return both / math.sqrt(alone) if alone > 0 else math.nan


class CrossSums(NamedTuple):
    """Sums over n tokens, of features x and y in C and D channels, from which HSIC follows."""

    cross_CD: Tensor
    """Of x y^T."""
    sum_xC: Tensor
    sum_yD: Tensor
    scaled_xC: Tensor
    """Of |y|^2 x."""
    scaled_yD: Tensor
    """Of |x|^2 y."""
    square_x: Tensor
    square_y: Tensor
    square_xy: Tensor
    """Of |x|^2 |y|^2."""
    tokens: float


def hsic(gram_ZZ: Tensor, first: int, second: int) -> float:
    """Unbiased HSIC of t and p (0: t, 1: p) by the Gram matrix of `Sums`."""
    width = (len(gram_ZZ) - 3) // 2
    x, y = (slice(at * width, (at + 1) * width) for at in (first, second))
    norm_x, norm_y = 2 * width + first, 2 * width + second
    sums = CrossSums(
        cross_CD=gram_ZZ[x, y],
        sum_xC=gram_ZZ[-1, x],
        sum_yD=gram_ZZ[-1, y],
        scaled_xC=gram_ZZ[norm_y, x],
        scaled_yD=gram_ZZ[norm_x, y],
        square_x=gram_ZZ[-1, norm_x],
        square_y=gram_ZZ[-1, norm_y],
        square_xy=gram_ZZ[norm_x, norm_y],
        tokens=float(gram_ZZ[-1, -1]),
    )
    return unbiased_hsic(sums)


def unbiased_hsic(sums: CrossSums) -> float:
    """Unbiased HSIC of linear kernels K of x and L of y; NaN for fewer than 4 tokens.

    With zero diagonals: [tr KL + 1'K1 1'L1 / (n-1)(n-2) - 2 1'KL1 / (n-2)] / n(n-3).
    """
    count = sums.tokens
    if count < 4:
        return math.nan
    diagonals = sums.square_xy  # sum of K_ii L_ii
    trace = sums.cross_CD.square().sum() - diagonals
    ones_k = sums.sum_xC @ sums.sum_xC - sums.square_x
    ones_l = sums.sum_yD @ sums.sum_yD - sums.square_y
    ones_kl = sums.sum_xC @ sums.cross_CD @ sums.sum_yD + diagonals
    ones_kl -= sums.sum_xC @ sums.scaled_xC + sums.sum_yD @ sums.scaled_yD
    total = trace + ones_k * ones_l / ((count - 1) * (count - 2)) - 2 * ones_kl / (count - 2)
    return float(total / (count * (count - 3)))


@torch.inference_mode()
def agreements(models: Sequence[Model], images: ImageSet, *, cka: bool = True) -> dict[Pair, Sums]:
    """Sums over the images of every student's predictions of every teacher of the same name.

    One pass over the images for all models, after one over `FITTED` of them for the teachers'
    scales. A teacher's map is resized to the student's grid. Every rank calls it. RuntimeError, on
    every rank, for features that are not finite, or predictions of another width than the
    teacher's.
    """
    students = [model for model in models if model.role != "teacher"]
    teachers = [model for model in models if model.role == "teacher"]
    if not students or not teachers:
        return {}
    scales = fit_scales(teachers, images)
    found: dict[Pair, Sums] = {}
    with raised_on_all_ranks("the agreement with teachers", REMEDY):
        for batch in images.batches([model.size for model in (*teachers, *students)]):
            targets = own_tokens(teachers, batch)
            add_batch(found, batch, students, targets, scales=scales, cka=cka)
    names = dist.all_gather_objects(list(found))[0]
    found = {pair: found[pair].reduced() for pair in names}
    with raised_on_all_ranks("the agreement with teachers", REMEDY):
        refuse_not_finite(found)
    return found


def add_batch(
    found: dict[Pair, Sums],
    batch: EvalBatch,
    students: Sequence[Model],
    targets: Mapping[str, Tokens],
    *,
    scales: Scales,
    cka: bool,
) -> None:
    """Add a batch to the sums of each pair, new ones included."""
    counted_B = torch.from_numpy(batch.place_B != FILLER)
    for student in students:
        projection = student.encode(batch.images[student.size], PROJECTION).projection or {}
        for teacher, target in targets.items():
            if teacher not in projection:
                continue
            pred = projection[teacher]
            if pred.patch_BNC.numel() and target.patch_BNC.numel():
                target = to_grid(target, round(pred.patch_BNC.shape[1] ** 0.5))
            for kind, of_target, of_pred in zip(KINDS, target, pred, strict=True):
                if not of_target.numel() or not of_pred.numel():
                    continue  # a kind of token that is not learned
                pair = Pair(student.name, teacher, kind)
                target_NC, pred_NC = (rows(x, counted_B) for x in (of_target, of_pred))
                refuse_other_width(pair, target_NC, pred_NC)
                sums = found.setdefault(pair, empty_sums(target_NC, student.size, cka=cka))
                per_image = of_target[0].numel() // of_target.shape[-1]
                sums.add(target_NC, pred_NC, scales[teacher, kind], per_image=per_image)
                sums.images += int(counted_B.sum())


def empty_sums(like_NC: Tensor, size: int, *, cka: bool) -> Sums:
    """Sums of no tokens."""
    width = like_NC.shape[1]
    wide = 2 * width + 3 if cka else 0
    zeros = like_NC.new_zeros(wide, wide, dtype=torch.float64)
    return Sums(zeros, zeros.new_zeros(width), zeros.new_zeros(5), size)


def rows(tokens: Tensor, counted_B: Tensor) -> Tensor:
    """Tokens (N, C) of the images that count, from (B, C) or (B, N, C)."""
    return tokens[counted_B.to(tokens.device)].flatten(0, -2)


def own_tokens(teachers: Sequence[Model], batch: EvalBatch) -> dict[str, Tokens]:
    """Each teacher's own tokens of a batch, by the teacher's name, which a model's may differ from.

    ValueError for two models of one teacher.
    """
    found: dict[str, Tokens] = {}
    models: dict[str, str] = {}
    for model in teachers:
        projection = model.encode(batch.images[model.size], PROJECTION).projection
        assert projection and len(projection) == 1, f"{model.name} has no own"
        ((name, tokens),) = projection.items()
        if name in models:
            raise ValueError(
                f"the models {models[name]!r} and {model.name!r} are both teacher {name!r}; leave"
                " one out of --models, or name its source, as in OTHER=KIND:REST"
            )
        models[name], found[name] = model.name, tokens
    return found


def fit_scales(teachers: Sequence[Model], images: ImageSet) -> Scales:
    """Mean and deviation of each teacher's channels, over `FITTED` images spread over the set."""
    total = len(images)
    only = np.unique(np.linspace(0, total - 1, min(FITTED, total)).astype(np.int64))
    sums: dict[tuple[str, str], Tensor] = {}
    with raised_on_all_ranks("the agreement with teachers", REMEDY):
        if not total:
            raise ValueError("there are no images; give data.val or data.val_share")
        for batch in images.batches([model.size for model in teachers], only):
            counted_B = torch.from_numpy(batch.place_B != FILLER)
            for name, tokens in own_tokens(teachers, batch).items():
                for kind, part in zip(KINDS, tokens, strict=True):
                    if part.numel():
                        x_NC = rows(part, counted_B).double()
                        sums_3C = torch.stack([torch.ones_like(x_NC), x_NC, x_NC.square()]).sum(1)
                        sums[name, kind] = sums.get((name, kind), 0) + sums_3C
    names = dist.all_gather_objects(list(sums))[0]
    return {key: scale_of(dist.all_reduce_sum(sums[key])) for key in names}


def scale_of(sum_3C: Tensor) -> Scale:
    """Mean and deviation by the sums of 1, x and x^2; the deviation is at least the floor's."""
    mean_C = sum_3C[1] / sum_3C[0].clamp(min=1)
    std_C = (sum_3C[2] / sum_3C[0].clamp(min=1) - mean_C.square()).clamp(min=0).sqrt()
    std_C = std_C.maximum(STD_FLOOR * std_C.median())
    return Scale(mean_C, std_C.clamp(min=torch.finfo(torch.float32).eps))


def refuse_other_width(pair: Pair, target_NC: Tensor, pred_NC: Tensor) -> None:
    """Raise ValueError unless tokens and channels of both are as many."""
    if target_NC.shape != pred_NC.shape:
        raise ValueError(
            f"{pair.student!r} predicts {pred_NC.shape[1]} channels of teacher {pair.teacher!r},"
            f" which has {target_NC.shape[1]}: it was trained with another teacher of that name;"
            " name that one in --models as NAME=SOURCE"
        )


def refuse_not_finite(found: Mapping[Pair, Sums]) -> None:
    """Raise ValueError for sums that are not finite."""
    for pair, sums in found.items():
        if not sums.sum_5.isfinite().all():
            raise ValueError(
                f"features of teacher {pair.teacher!r}, or its prediction by {pair.student!r}, are"
                " NaN or infinite; leave the task teacher out of --eval.tasks"
            )
