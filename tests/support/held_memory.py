"""Measures the memory of ranks under DeepSpeed, for test_estimate.py: `held_memory.py PLAN.json`.

For each row of the plan, a recipe's options and a ds_config, a student is built, stepped twice and
measured: bytes of all tensors that are alive, by when they came, what autograd keeps, and bytes
that collectives send.
"""

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from unic_ds import config, dist
from unic_ds.config import ds_config, overrides, recipes
from unic_ds.engine import deepspeed_engine
from unic_ds.losses import balance
from unic_ds.losses.distill import distill_loss
from unic_ds.models.ladder import Head, heads_of
from unic_ds.models.student import Student
from unic_ds.planning.counters import flop_counter
from unic_ds.tokens import Target, Tokens
from unic_kernels.ops import KERNELS

WIDTHS = {"effnet": 1280, "dinov2": 384}


class Sent(TorchDispatchMode):
    """Bytes that a rank sends in collectives, each taken to be a ring."""

    ROUNDS: ClassVar = {"allreduce": 2, "reduce_scatter": 1, "reduce": 1, "allgather": 1}
    """How often a ring sends the whole of the larger of what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        kind = next((k for k in self.ROUNDS if name.strip("_").startswith(k)), None)
        if space == "c10d" and kind:
            # Each of the first two may be a list, of which an all-gather's has lists itself.
            sizes = [sum(x.nbytes for x in tree_iter(a) if isinstance(x, Tensor)) for a in args[:2]]
            share = (dist.world() - 1) / dist.world()
            self.nbytes += self.ROUNDS[kind] * share * max(sizes)
        return func(*args, **(kwargs or {}))


def held() -> int:
    """Bytes of the storages of all tensors that Python knows."""
    gc.collect()
    sizes: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in gc.get_objects():
            if isinstance(found, Tensor) and not found.is_meta:
                # a gradient that no Python code has touched is no Python object
                for tensor in (found, found.grad if found.is_leaf else None):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def targets(cfg: config.Config, micro: int, tokens: int, dtype: torch.dtype) -> dict[str, Target]:
    """Random tokens of the recipe's teachers."""
    return {
        row.name: Target.of(
            Tokens(
                torch.randn(micro, WIDTHS[row.name], dtype=dtype),
                torch.randn(micro, tokens, WIDTHS[row.name], dtype=dtype),
            )
        )
        for row in cfg.teachers
    }


def measure(options: dict[str, str], file: dict[str, Any]) -> dict[str, float]:
    """One row's figures, and what is left when the run lets its engine go."""
    start = held()
    return stepped(options, file, start) | {"left": held() - start}


def stepped(options: dict[str, str], file: dict[str, Any], start: int) -> dict[str, float]:
    """Figures of a student's first two steps; `start` bytes were there before."""
    cfg = overrides.override_all(recipes.get("quickstart"), options)
    settings = ds_config.merge(file, cfg, dist.world())
    micro = settings.micro_batch
    heads: dict[str, Head] = heads_of(cfg, WIDTHS)
    student = Student(cfg.student, cfg.ladder, heads, seed=0, ops=KERNELS[cfg.kernels])
    made = deepspeed_engine.build(student, cfg.optim, settings)
    dtype = student.dtype
    side = cfg.student.size
    image = torch.randint(0, 255, (micro, 3, side, side), dtype=torch.uint8)
    said = targets(cfg, micro, (side // 16) ** 2, dtype)
    given = sum(x.nbytes for target in said.values() for x in (*target.features, *target[1:3]))
    own = {x.untyped_storage().data_ptr() for target in said.values() for x in target.features}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        weights = {p.untyped_storage().data_ptr() for p in student.parameters()}  # ZeRO-3 gathers
        if storage.data_ptr() not in own | weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    for block in student.recomputed:  # whose input is kept where no hook is called for it
        block.register_forward_pre_hook(lambda _, given: (pack(given[0]), None)[1])
    after: dict[str, int] = {}
    for number in range(4):  # two optimiser steps of two micro batches
        kept.clear()
        path_BK = torch.rand(micro, len(student.paths))
        drop_TB = torch.rand(len(cfg.teachers), micro)
        counter = flop_counter()
        if number % 2 == 0:
            sent = Sent()
        with sent, counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            pred = made(image, path_BK)
            loss, _ = distill_loss(
                pred,
                said,
                drop_TB,
                loss=cfg.loss,
                balance=balance.build(cfg),
                ops=KERNELS[cfg.kernels],
            )
        forward_flops = counter.get_total_flops()
        with sent, counter:
            made.backward(loss)
        del pred, loss
        if number == 2:  # ZeRO-1 has not reduced yet
            after["backward"] = held()
        with sent:
            made.step()
        if number % 2:
            after["step"] = held()
    given += image.nbytes + path_BK.nbytes + drop_TB.nbytes
    deepspeed_engine.free_memory(made)
    return {
        "between": after["step"] - start - given,
        "gradients": after["backward"] - after["step"],
        "kept": sum(kept.values()),
        "sent": sent.nbytes,
        "forward_flops": forward_flops,
        "step_flops": forward_flops + counter.get_total_flops(),
    }


if __name__ == "__main__":
    plan = next(word for word in sys.argv[1:] if not word.startswith("--"))
    dist.start()
    rows = [measure(options, file) for options, file in json.loads(Path(plan).read_text())]
    if dist.rank() == 0:
        Path(plan).with_suffix(".measured").write_text(json.dumps(rows))
