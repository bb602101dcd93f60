"""Take steps on a device with streams: `ordered_steps.py PLAN.json`, on two ranks.

The plan is a list of (ds_config file, micro batches, settings of `zero_optimization`, waits), where
waits are `ours`, `deepspeed` (its own) or `none` (left out, which must show as races). For each
row: losses, where the host waited within the steps, and races.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from ordered_device import OrderedDevice, Races, install
from torch import Tensor, nn

from unic_ds import config, dist
from unic_ds.config import ds_config
from unic_ds.engine import deepspeed_engine, optim

STEPS, WIDTH = 3, 32


class Layers(nn.Module):
    """Linears enough for several buckets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD.to(torch.bfloat16)
        for layer in self.layers:
            x_BD = x_BD + layer(x_BD).relu()
        return x_BD.float().square().mean()


def take(row: list[Any], device: OrderedDevice) -> dict[str, Any]:
    """Take the steps of one row of the plan."""
    file, micro, zero, waits = row
    cfg = config.Config(optim=config.Optim(batch_size=2 * micro))
    given = ds_config.read(file) | {"train_micro_batch_size_per_gpu": 1}
    given["zero_optimization"] |= {"reduce_bucket_size": 2 * WIDTH * (WIDTH + 1)} | zero
    settings = ds_config.merge(given, cfg, dist.world())
    keep = deepspeed_engine.wait_on_device
    if waits != "ours":
        deepspeed_engine.wait_on_device = lambda *_: None
    made = deepspeed_engine.build(
        deepspeed_engine.partitioned(Layers, settings), cfg.optim, settings
    )
    deepspeed_engine.wait_on_device = keep
    names = ("reduction_stream", "reduce_and_partition_stream")
    (reduces,) = (vars(made.optimizer)[name] for name in names if name in vars(made.optimizer))
    if waits == "none":
        device.synchronize = reduces.synchronize = lambda *_: None
    optim.apply(made.optimizer, 1e-2)
    device.host_waits.clear()
    losses, races = [], Races(device, reduces)
    with races:
        for step in range(STEPS):
            for at in range(micro):
                x_BD = torch.linspace(-1, 1, WIDTH).roll(step + 7 * at + 3 * dist.rank())[None]
                loss = made(x_BD)
                made.backward(loss)
                races.end_backward()
                made.step()
                losses.append(loss.detach())
            races.end_step()
    vars(device).pop("synchronize", None)
    told = {"losses": [loss.item() for loss in losses], "races": dict(races.found)}
    return told | {"host_waits": dict(device.host_waits)}


if __name__ == "__main__":
    plan = next(word for word in sys.argv[1:] if not word.startswith("--"))
    dist.start()
    deepspeed_engine.load_deepspeed()
    made = install()
    rows = [take(row, made) for row in json.loads(Path(plan).read_text())]
    if dist.rank() == 0:
        Path(plan).with_suffix(".measured").write_text(json.dumps(rows, indent=1))
