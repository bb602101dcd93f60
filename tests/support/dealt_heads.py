"""The scores of heads that ranks train together: `dealt_heads.py OUT.json`.

OUT.json has the scores of every rank, and what an error on one rank raises.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from dense_sets import MemorySamples, class_maps, depth_set, mask_set, token_model
from memory_sets import scores_of
from torch import Tensor

from unic_ds import dist
from unic_ds.config import Eval
from unic_ds.evaluate.features import Model, ModelOutput, Outputs

STEPS = {"segmentation": 40, "depth": 7}


def mixed(colour_B3HW: Tensor) -> Tensor:
    """Tokens that tell the classes, but not by one channel each."""
    weight_CK = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.4], [0.3, 0.1, 1.0], [0.1, 0.2, 0]])
    return torch.einsum("bkhw,ck->bchw", colour_B3HW / 8, weight_CK)


def harmed(samples: MemorySamples) -> MemorySamples:
    """A set with an image that cannot be read."""
    return replace(samples, samples=[*samples.samples[:2], None, *samples.samples[3:]])


def broken_on_rank_1() -> Model:
    """A model whose features are not finite on one rank."""
    model = token_model("broken", 8, 4, mixed)

    def encode(image_B3HW: Tensor, needs: frozenset[ModelOutput]) -> Outputs:
        found = model.encode(image_B3HW, needs)
        return found._replace(patch_BNC=found.patch_BNC * (torch.nan if dist.rank() else 1))

    return replace(model, encode=encode)


def measured() -> list[object]:
    """Scores and protocols of both tasks, and the sentence of a failure."""
    models = [token_model("p4", 8, 4, mixed), token_model("p3", 6, 3, mixed, flexible=True)]
    found: list[object] = []
    for task, make in (("segmentation", mask_set), ("depth", depth_set)):
        sets = {
            name: harmed(make(class_maps(count, 12, 20, block=6, seed=count)))
            for name, count in (("train", 11), ("val", 7))
        }
        options = Eval(head_images=STEPS[task] * 16, size=8, batch=4)
        scores = scores_of(task, models, sets, options)
        found.append([[score.value, score.protocol] for score in scores])
        if dist.world() > 1:
            try:
                scores_of(task, [broken_on_rank_1()], sets, options)
            except RuntimeError as error:
                found.append(str(error))
    return found


if __name__ == "__main__":
    dist.start()
    every = dist.all_gather_objects(measured())
    if dist.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(every))
