"""Teachers with texts and classifiers that a test chooses, and a set of tokens for them.

The "images" of a set are rows of CLS tokens and of a patch token, side by side, as each model
predicts them. As a script, `projected_sets.py FILE` writes the scores of every rank to FILE.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from memory_sets import MemoryImages
from torch import Tensor
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.config import Eval
from unic_ds.evaluate import registry
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import Model, ModelOutput, Outputs
from unic_ds.tokens import Tokens

WIDTH = 8


@dataclass
class WordTower:
    """A text tower whose embedding is the sum of its words' (`features.TextTower`)."""

    word_W8: Mapping[str, Tensor]
    seen: list[str]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit sums of the words that it knows."""
        self.seen += texts
        rows = [
            sum(self.word_W8.get(word, torch.zeros(WIDTH)) for word in t.split()) for t in texts
        ]
        return F.normalize(torch.stack([torch.as_tensor(row) for row in rows]), dim=-1)

    def project(self, cls_BC: Tensor) -> Tensor:
        """Twice the token: the length of an embedding does not matter."""
        return 2 * cls_BC


class TokenClassifier(NamedTuple):
    """A classifier whose logits are channels of one kind of token (`features.Classifier`)."""

    classes: int
    kinds: frozenset[str]

    def logits(self, tokens: Tokens) -> Tensor:
        """The first channels of CLS, or of the patches' mean."""
        row_BC = tokens.cls_BC if "cls" in self.kinds else tokens.patch_BNC.mean(1)
        return row_BC[:, : self.classes]


def projecting(name: str, teachers: Sequence[str], *, patches: bool = True) -> Model:
    """A model that predicts the set's tokens for some teachers; without `patches`: CLS alone."""

    def encode(row_B2C: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        patch_B1C = row_B2C[:, 1:] if patches else row_B2C.new_empty(0)
        return Outputs(projection=dict.fromkeys(teachers, Tokens(row_B2C[:, 0], patch_B1C)))

    return Model(name, 1, frozenset({"projection"}), encode)


def token_set(label_N: Tensor, classes: Sequence[str], *, noise: float = 0.0) -> MemoryImages:
    """A set whose CLS tokens have the label's channel, and whose patch tokens have the next."""
    draws = torch.Generator().manual_seed(0)
    cls_NC = F.one_hot(label_N.clamp(min=0), WIDTH).float()
    row_N2C = torch.stack([cls_NC, cls_NC.roll(1, 1)], 1)
    row_N2C = row_N2C + noise * torch.randn(row_N2C.shape, generator=draws)
    return MemoryImages(row_N2C, label_N, tuple(classes))


def scores() -> list[Score]:
    """Scores of both tasks on a set that is dealt to the ranks."""
    names = ("ant", "bee", "cat", "dog", "elk")
    images = token_set(torch.arange(43) % 5, names, noise=0.5)
    images.label_N[7] = -1
    words = dict(zip(names, torch.eye(WIDTH), strict=False))
    data = EvalData(
        {"train": images, "val": images},
        options=Eval(),
        seed=0,
        device=dist.device(),
        text_towers={"clip": WordTower(words, [])},
        classifiers={"vit": TokenClassifier(5, frozenset({"patch"}))},
    )
    models = [projecting("student", ["clip", "vit"]), projecting("teacher clip", ["clip"])]
    return registry.evaluate_models(models, data, ["zeroshot", "plugplay"])


if __name__ == "__main__":
    dist.start()
    every = dist.all_gather_objects(scores())
    if dist.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(every))
