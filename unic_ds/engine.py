"""DeepSpeed: ZeRO, precision and accumulation; the only module that imports it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import config, dist, ds_config, optim
from unic_ds.average import KEY, AveragedAdamW, in_place_of_weights


def create(make: Callable[[], Any], settings: dict[str, Any]) -> Any:
    """What `make` makes; under ZeRO-3 no rank ever holds all of it.

    Each parameter is partitioned at the end of its module's constructor, in the precision of the
    settings; what else is computed there stays in fp32, as under the other stages. Values written
    later are written through `whole`.
    """
    if ds_config.stage(settings) < 3:
        return make()
    init: Any = load_deepspeed().zero.Init

    class Birth(init):
        def _post_init_method(self, module: nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(self.dtype)
            super()._post_init_method(module)

    own = settings["zero_optimization"] | {"override_module_apply": False}
    linear = F.linear
    try:
        with Birth(config_dict_or_path=settings | {"zero_optimization": own}, tensor_overrides=[]):
            student = make()
        if F.linear is not linear:
            confine(student, F.linear)
    finally:
        F.linear = linear
    return student


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[bool]:
    """All of a parameter while the body runs, and whether what this rank writes there counts.

    Of one that ZeRO-3 has partitioned rank 0's values go to all; every rank must enter.
    """
    if not hasattr(parameter, "ds_id"):
        yield True
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        yield dist.rank() == 0


def shape(value: Tensor) -> torch.Size:
    """What a tensor's shape is where it is whole."""
    return getattr(value, "ds_shape", value.shape)


def build(student: nn.Module, cfg: config.Optim, settings: dict[str, Any]) -> Any:
    """A DeepSpeed engine around `student` with AdamW on its trained parameters."""
    deepspeed = load_deepspeed()
    groups = optim.groups(student, cfg.weight_decay, layer_decay=cfg.layer_decay)
    optimizer = adamw(groups, cfg)
    linear = F.linear
    engine, *_ = deepspeed.initialize(
        model=student, optimizer=optimizer, config=settings, dist_init_required=False
    )
    if F.linear is not linear:
        confine(student, F.linear)
        F.linear = linear
    optimizer.state.clear()  # under ZeRO-0 in bf16 DeepSpeed took a step of zero gradients
    return engine


def adamw(groups: list[dict[str, Any]], cfg: config.Optim) -> torch.optim.AdamW:
    """AdamW, with an average of the weights where `cfg.ema` asks; its rate comes with each step."""
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": (cfg.beta1, cfg.beta2),
        "eps": cfg.eps,
        "fused": True,
    }
    if cfg.ema:
        return AveragedAdamW(groups, decay=cfg.ema, **options)
    return torch.optim.AdamW(groups, **options)


def confine(student: nn.Module, linear: Any) -> None:
    """Give the student's Linears, and nothing else of this process, the `linear` of ZeRO-3.

    DeepSpeed replaces `F.linear` for everybody by one that keeps no gathered weight. In bf16 it
    rounds before it adds the bias, so frozen teachers would give other targets than under ZeRO-2.
    """

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        return linear(x, module.weight, module.bias)

    for module in student.modules():
        if type(module) is nn.Linear:
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def load_deepspeed() -> Any:
    """DeepSpeed, without its chatter, and without the C++ all-reduce it would compile on a CPU box.

    That op costs a compiler and half a minute at the first start, and serves one node only; gloo
    does the job.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch 2.14 renamed.
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def weights(engine: Any, prefix: str) -> dict[str, Tensor]:
    """What is exported: fp32 weights under `prefix` (cut off), on the CPU of rank 0; others: none.

    Their average where the run keeps one. Every rank must call it: weights are gathered one by one.
    """
    masters, found = whole_masters(engine.optimizer), {}
    with in_place_of_weights(engine.basic_optimizer):
        for name, parameter in engine.module.named_parameters():
            if name.startswith(prefix):
                full = gather(parameter, masters)
                if dist.rank() == 0:
                    found[name.removeprefix(prefix)] = full.float().cpu().clone()
                del full
    return found


def gather(parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor]) -> Tensor:
    """The whole of a parameter, in fp32 where it is trained."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    full = masters.get(parameter)
    if full is None and parameter.requires_grad:
        full = safe_get_full_fp32_param(parameter)
    if full is None:
        with GatheredParameters([parameter]):
            full = parameter.detach().clone()
    return full.detach()


def whole_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Each bf16 parameter's fp32 master where every rank holds all of it: under ZeRO-0."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return {}
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def weights_on_disk(shards: Path, prefix: str) -> dict[str, Tensor]:
    """What `weights` gives, from the ZeRO shards of a checkpoint of our own."""
    from deepspeed.utils import zero_to_fp32 as disk

    if not any(shards.glob("*_optim_states.pt")):
        raise ValueError(
            f"{str(shards)!r} was saved under ZeRO-0, whose checkpoints hold no shards to read;"
            " the training command itself exports at its end"
        )
    files = disk.get_optim_files(str(shards))
    stage, world, masters, paddings = disk.parse_optim_states(files, str(shards))
    models = disk.parse_model_states(disk.get_model_state_files(str(shards)))
    flat = [averages_on_disk(Path(f), m) for f, m in zip(files, masters, strict=True)]
    if stage == 3:
        state = disk._get_fp32_state_dict_from_zero3_checkpoint(world, flat, models, False)
    else:
        state = disk._get_fp32_state_dict_from_zero2_checkpoint(
            world, flat, models, False, paddings
        )
        # ZeRO-1 saves frozen weights with the module alone
        state = whole_module(shards) | state
    wanted = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return disk.to_torch_tensor(wanted, dtype=torch.float32)


def whole_module(shards: Path) -> dict[str, Tensor]:
    """The module's weights as ZeRO-1 and 2 save them, in the precision that it computes in."""
    file = shards / "mp_rank_00_model_states.pt"
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]


def averages_on_disk(file: Path, masters: list[Tensor]) -> list[Tensor]:
    """A rank's averages in the place of its flat fp32 `masters`; these where none are kept."""
    shard = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    saved = shard["optimizer_state_dict"]
    state = saved.get("optimizer_state_dict", saved.get("base_optimizer_state"))["state"]
    # a master is saved without its padding, the state of the same index with it
    return [
        state[i][KEY][: len(master)] if KEY in state.get(i, {}) else master
        for i, master in enumerate(masters)
    ]


def copies(engine: Any) -> int:
    """fp32 numbers that a checkpoint holds for each weight: itself, two moments, an average."""
    return 4 if isinstance(engine.basic_optimizer, AveragedAdamW) else 3


def grad_norm(engine: Any) -> Tensor | float | None:
    """The last step's gradient norm over all ranks as DeepSpeed kept it, if it did; not read."""
    return engine.get_global_grad_norm()
