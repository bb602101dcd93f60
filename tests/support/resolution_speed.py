"""Compares steps of a run that draws its resolution with those of runs of one resolution.

`resolution_speed.py OPTIONS` trains a ViT-Ti at 96, 112 and 144 px from two ViT-Ti of random
weights, in turns of a run that draws these sides and a run for each of them. Prints one JSON
object: the median step at each side of either, and the ratio of their means. The options are those
of unic_ds/train.py; `--data.train` is needed.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from dataclasses import replace
from statistics import fmean, median

import timm
import torch
from torch import nn

from unic_ds.config import args, job
from unic_ds.process import entry_point
from unic_ds.tokens import Tokens
from unic_ds.training import loop, setup
from unic_ds.training.state import RunContext, TrainState

TURNS, STEPS = 4, 4  # the first turn, and the first step of each, are not counted
SIZES = (96, 112, 144)
TEACHERS = ",".join(f"t{i}=python:resolution_speed:any_side" for i in range(2))
SETTINGS = {
    "--ds_config": "ds_configs/zero1.json",
    "--recipe": "unic_b",
    "--teachers": TEACHERS,
    "--student.model": "vit_tiny_patch16_224",
    "--student.size": "112",
    "--data.sizes": ",".join(map(str, SIZES)),
    "--optim.batch_size": "16",
    "--eval.on": "false",
    "--resume": "never",
}


class AnySide(nn.Module):
    """timm's ViT-Ti/16 of random weights, for images of any side."""

    patch_size = 16
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)

    def forward(self, images: torch.Tensor) -> Tokens:
        """CLS and patch tokens."""
        tokens_BNC = self.vit.forward_features(images)
        return Tokens(tokens_BNC[:, 0], tokens_BNC[:, 1:])


def any_side() -> AnySide:
    """A teacher."""
    return AnySide()


def main(argv: list[str]) -> int:
    """Take turns, and print what came of it."""
    words = [word for pair in SETTINGS.items() for word in pair]
    drawn = job.resolve(args.parse([*words, *argv])[1])
    with loop.start_watchdog(drawn) as dog:
        runs = {"drawn": setup.build(drawn, dog.set_phase)}
        for size in SIZES:
            data, student = replace(drawn.cfg.data, sizes=()), replace(drawn.cfg.student, size=size)
            cfg = replace(drawn.cfg, data=data, student=student)
            runs[str(size)] = setup.build(replace(drawn, cfg=cfg), dog.set_phase)
        seconds: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in runs}
        for turn in range(TURNS):
            for name, (run, state) in runs.items():
                steps = len(SIZES) * STEPS if name == "drawn" else STEPS
                time_steps(run, state, steps, seconds[name] if turn else defaultdict(list))
        for run, _ in runs.values():
            run.stream.close()
    middle = {
        name: {size: round(median(found), 4) for size, found in sorted(by_size.items())}
        for name, by_size in seconds.items()
    }
    fixed = fmean(middle[str(size)][size] for size in SIZES)
    ratio = round(fmean(middle["drawn"].values()) / fixed, 3)
    print(json.dumps(middle | {"ratio": ratio}))
    return 0


def time_steps(
    run: RunContext, state: TrainState, steps: int, seconds: dict[int, list[float]]
) -> None:
    """Take so many steps; add the seconds of each but the first to those of its side."""
    for number in range(steps):
        state.step += 1
        begun = time.perf_counter()
        loop.train_step(run, state)
        if number:
            seconds[run.resolution_of(state.step).size].append(time.perf_counter() - begun)


if __name__ == "__main__":
    sys.exit(entry_point.run(main, sys.argv[1:]))
