"""Zero-shot classification by class names (arXiv 2103.00020, section 3.1).

A class is the mean of the unit embeddings of its prompts, an image the projection of its CLS token
to the text space of a CLIP or SigLIP teacher: the teacher's own token, or the student's prediction
of it (arXiv 2408.05088, section 4).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.config import Eval
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Annotation, ImageSet, Model, ModelOutput, TextTower
from unic_ds.evaluate.projected import (
    TOP,
    WNID,
    Accuracy,
    Head,
    accuracies,
    class_numbers,
    imagenet_ids,
)
from unic_ds.evaluate.rank_errors import raised_on_all_ranks
from unic_ds.files import read_text
from unic_ds.files.printable import printable
from unic_ds.process import console
from unic_ds.tokens import Tokens

IMAGENET = "imagenet"
BLANKS = str.maketrans("_-", "  ")
AT_ONCE = 8
"""Classes whose prompts are embedded at once."""
REMEDY = "lower --eval.batch"


class Texts(NamedTuple):
    """Lines and where they come from, for the protocol."""

    lines: tuple[str, ...]
    origin: str


class ZeroShot:
    """Accuracy in % by class names: options `eval.class_names` and `eval.templates`."""

    model_needs: frozenset[ModelOutput] = frozenset({"projection"})
    data_needs: frozenset[Annotation] = frozenset({"labels"})

    def check(self, data: EvalData) -> None:
        """Raise ValueError for class names or prompts that do not fit."""
        class_names(data.val, data.options)
        templates(data.options)

    def evaluate(self, models: Sequence[Model], data: EvalData) -> Iterator[Score]:
        """Yield `zeroshot TEACHER` of each model, and the top-5 of more than ten classes.

        ValueError for class names or prompts that do not fit.
        """
        if not data.text_towers:
            console.say("not evaluated by zeroshot, which needs a teacher with a text tower")
            return
        with raised_on_all_ranks("the task zeroshot", REMEDY):
            names, prompts = class_names(data.val, data.options), templates(data.options)
        heads = {}
        for teacher, tower in data.text_towers.items():
            class_LE = classifier_of(tower, names.lines, prompts.lines).to(data.device)
            heads[teacher] = Head(partial(similarities, tower, class_LE), frozenset({"cls"}))
        rule = f"classes {names.origin}, prompts {prompts.origin}, cosine"
        for found in accuracies(models, data.val, heads, task="the task zeroshot"):
            yield from scores(found, len(names.lines), rule)


def scores(found: Accuracy, classes: int, rule: str) -> Iterator[Score]:
    """A model's scores by one teacher's text tower."""
    used = f"{rule}, {classes} classes {found.images} images {found.model.size} px"
    name = f"zeroshot {found.teacher}"
    yield Score(found.model.name, name, found.first, f"{name} top-1, {used}")
    if classes > 2 * TOP:
        yield Score(found.model.name, f"{name} top-5", found.five, f"{name} top-5, {used}")


def similarities(tower: TextTower, class_LE: Tensor, tokens: Tokens) -> Tensor:
    """Cosines (B, L) of images and classes."""
    return F.normalize(tower.project(tokens.cls_BC).float(), dim=-1) @ class_LE.T


@torch.inference_mode()
def classifier_of(tower: TextTower, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Unit embeddings (L, E) of classes: means of those of their prompts.

    The same as open_clip's `build_zero_shot_classifier`. Classes are dealt to the ranks, all of
    which call it.
    """
    own = range(dist.rank(), len(names), dist.world())
    with raised_on_all_ranks("the text tower", REMEDY):
        width = tower.embed([prompts[0].replace("{}", names[0])]).shape[1]
        parts = []
        for at in range(0, len(own), AT_ONCE):
            few = [names[i] for i in own[at : at + AT_ONCE]]
            texts = [prompt.replace("{}", name) for name in few for prompt in prompts]
            parts.append(tower.embed(texts).float().unflatten(0, (len(few), -1)).mean(1).cpu())
        class_LE = torch.zeros(len(names), width)
        if parts:
            class_LE[torch.tensor(own)] = torch.cat(parts)
    return F.normalize(dist.all_reduce_sum(class_LE), dim=-1)


def class_names(images: ImageSet, options: Eval) -> Texts:
    """Names of a set's classes by `eval.class_names`; ValueError for names that do not fit."""
    if options.class_names == IMAGENET:
        return imagenet_names(images)
    if options.class_names:
        found = lines_of(options.class_names, "eval.class_names")
        if numbers := class_numbers(images.classes):
            return found._replace(lines=numbered(found.lines, numbers, images))
        if len(found.lines) != len(images.classes):
            raise ValueError(
                f"eval.class_names has {len(found.lines)} names in {options.class_names!r}, but"
                f" {images.name!r} has {len(images.classes)} classes; write one name per line, in"
                " the order of the class folders"
            )
        return found
    coded = next((name for name in images.classes if WNID.fullmatch(name)), "")
    if coded:
        raise ValueError(
            f"{images.name!r} has folders such as {coded}, whose name says nothing to a text tower;"
            f" give --eval.class_names {IMAGENET}, or a file of names"
        )
    return Texts(tuple(name.translate(BLANKS).strip() for name in images.classes), "by folder")


def numbered(lines: Sequence[str], numbers: Sequence[int], images: ImageSet) -> tuple[str, ...]:
    """The names of numbered classes, of which line 0 has the first; ValueError if lines lack."""
    if max(numbers) >= len(lines):
        raise ValueError(
            f"{images.name!r} has the class folder {max(numbers)}, but eval.class_names has"
            f" {len(lines)} names, numbered from 0; give a file of more names"
        )
    return tuple(lines[number] for number in numbers)


def imagenet_names(images: ImageSet) -> Texts:
    """open_clip's names of ImageNet's classes, all or some; ValueError for other classes.

    They are found by WordNet ids, or by numbers in the order of these.
    """
    origin = "open_clip's of ImageNet"
    if numbers := class_numbers(images.classes):
        return Texts(numbered(IMAGENET_CLASSNAMES, numbers, images), origin)
    name_of = dict(zip(imagenet_ids(len(IMAGENET_CLASSNAMES)), IMAGENET_CLASSNAMES, strict=True))
    strange = next((name for name in images.classes if name not in name_of), "")
    if strange:
        raise ValueError(
            f"{images.name!r} has the class folder {printable(strange)!r}, which is no WordNet id"
            f" of ImageNet-1k's, as --eval.class_names {IMAGENET} wants; give a file of names"
        )
    return Texts(tuple(name_of[name] for name in images.classes), origin)


def templates(options: Eval) -> Texts:
    """Prompts with {} for the name of the class; ValueError for a line without."""
    if not options.templates:
        lines = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
        return Texts(lines, f"open_clip's {len(lines)}")
    found = lines_of(options.templates, "eval.templates")
    bare = next((line for line in found.lines if "{}" not in line), "")
    if bare:
        raise ValueError(
            f"eval.templates has a line without {{}} in {options.templates!r}: {printable(bare)!r};"
            " put {} where the name of the class goes"
        )
    return found


def lines_of(path: str, option: str) -> Texts:
    """The lines of a text file that are not empty; ValueError if it cannot be read or has none."""
    try:
        text = read_text(Path(path).expanduser())
    except OSError as error:
        raise ValueError(f"{option}: {path!r} cannot be read ({error.strerror})") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{option}: {path!r} has no lines; write one entry per line")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    return Texts(lines, f"{len(lines)} of {Path(path).name} {digest}")
