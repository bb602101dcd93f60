"""Measures the gradients that two ranks reduce, per ds_config: `reduced_gradients.py PLAN.json`.

A weight per layer, whose gradient is what it is multiplied by, so that every sum is known. The
plan is a list of ds_config files; for each: the types in use, and the gradient that AdamW saw.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unic_ds import config, dist
from unic_ds.config import ds_config
from unic_ds.engine import deepspeed_engine, optim

GIVEN = ((256.0, 1.0, 1.0, 1.0), (3.0, 1.0, 1.0, 1.0))
"""Gradients by rank and micro batch: exact in bf16 each, their sum is not."""


class Line(nn.Module):
    """y = sum of w x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x_44: Tensor) -> Tensor:
        return (self.weight * x_44.to(self.weight.dtype)).sum()


def kinds(optimizer: Any) -> list[str]:
    """Types of the fp32 masters, wherever a stage keeps them."""
    name = "fp32_partitioned_groups_flat"
    held = getattr(optimizer, name, None) or optimizer.single_partition_of_fp32_groups
    return sorted({str(x.dtype) for x in held})


def seen(file: str, accumulation: int) -> dict[str, Any]:
    """One file's row."""
    cfg = config.Config(optim=config.Optim(batch_size=2 * accumulation))
    made_of = ds_config.read(file) | {"train_micro_batch_size_per_gpu": 1}
    made_of["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    settings = ds_config.merge(made_of, cfg, dist.world())
    assert settings.accumulation == accumulation
    made = deepspeed_engine.build(deepspeed_engine.partitioned(Line, settings), cfg.optim, settings)
    optim.apply(made.optimizer, 1e-3)
    for given in GIVEN[dist.rank()][:accumulation]:
        made.backward(made(torch.full((4, 4), given)))
        made.step()
    (state,) = made.basic_optimizer.state.values()
    moment = state["exp_avg"].flatten()[0].item()
    first = [rank[:accumulation] for rank in GIVEN]
    return {
        "communication": str(made.communication_data_type),
        "weights": str(made.module.weight.dtype),
        "masters": kinds(made.optimizer),
        "gradient": moment / (1 - cfg.optim.beta1),
        "exact": sum(map(sum, first)) / (2 * accumulation),
    }


if __name__ == "__main__":
    plan = next(word for word in sys.argv[1:] if not word.startswith("--"))
    dist.start()
    rows = [seen(file, count) for file, count in json.loads(Path(plan).read_text())]
    if dist.rank() == 0:
        print(*map(json.dumps, rows), sep="\n", flush=True)
        Path(plan).with_suffix(".measured").write_text(json.dumps(rows))
