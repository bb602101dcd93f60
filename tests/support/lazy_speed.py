"""Compares a step of lazy dropping with one of plain dropping: `lazy_speed.py OPTIONS`.

One process trains a ViT-B from four ViT-B teachers of random weights, in turns of a few steps of
each kind on the same student. Prints one JSON object. The options are those of unic_ds/train.py;
`--data.train` is needed.
"""

from __future__ import annotations

import json
import sys
import time
from statistics import median

import timm
import torch
from torch import nn

from unic_ds.config import args, job
from unic_ds.losses.dropping import LazyDropping
from unic_ds.process import entry_point
from unic_ds.tokens import Tokens
from unic_ds.training import loop, setup

TURNS, STEPS = 4, 3  # the first step of a turn is not counted
TEACHERS = ",".join(f"t{i}=python:lazy_speed:vit_base" for i in range(4))
SETTINGS = {
    "--ds_config": "ds_configs/zero2.json",
    "--recipe": "unic_b",
    "--teachers": TEACHERS,
    "--optim.batch_size": "8",
    "--eval.on": "false",
    "--drop.rate": "0.5",
    "--drop.lazy": "true",
    "--drop.full_every": "1000000",
    "--resume": "never",
}


class Base(nn.Module):
    """timm's ViT-B/16 of random weights."""

    image_size, patch_size = 224, 16
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model("vit_base_patch16_224", num_classes=0)

    def forward(self, images: torch.Tensor) -> Tokens:
        """CLS and patch tokens."""
        tokens_BNC = self.vit.forward_features(images)
        return Tokens(tokens_BNC[:, 0], tokens_BNC[:, 1:])


def vit_base() -> Base:
    """A teacher."""
    return Base()


def main(argv: list[str]) -> int:
    """Take turns, and print what came of it."""
    words = [word for pair in SETTINGS.items() for word in pair]
    task = job.resolve(args.parse([*words, *argv])[1])
    seconds: dict[str, list[float]] = {"lazy": [], "plain": []}
    with loop.start_watchdog(task) as dog:
        run, state = setup.build(task, dog.set_phase)
        lazy = state.balancer
        assert isinstance(lazy, LazyDropping)
        state.step = 1
        loop.train_step(run, state)  # full: finds the hardest teacher
        for _ in range(TURNS):
            for name, balancer in (("lazy", lazy), ("plain", lazy.full)):
                state.balancer = balancer
                for number in range(STEPS):
                    state.step += 1
                    begun = time.perf_counter()
                    loop.train_step(run, state)
                    if number:
                        seconds[name].append(time.perf_counter() - begun)
        run.stream.close()
    middle = {f"{name}_s": round(median(found), 3) for name, found in seconds.items()}
    print(json.dumps(middle | {"ratio": round(middle["plain_s"] / middle["lazy_s"], 3)}))
    return 0


if __name__ == "__main__":
    sys.exit(entry_point.run(main, sys.argv[1:]))
