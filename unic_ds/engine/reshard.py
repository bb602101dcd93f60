"""A checkpoint put together from the parts that other ranks, or another ZeRO stage, saved."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.engine.deepspeed_engine import whole_masters
from unic_ds.engine.ema import KEY


def weights(shards: Path) -> dict[str, Tensor]:
    """What `engine.weights` gives, by full names, from the ZeRO shards of our own checkpoint."""
    from deepspeed.utils.zero_to_fp32 import to_torch_tensor

    if not any(shards.glob("*_optim_states.pt")):
        raise ValueError(
            f"{str(shards)!r} was saved under ZeRO-0, whose checkpoints hold no shards to read;"
            " the training command itself exports at its end"
        )
    saved = ZeroShards(shards)
    state = saved.whole(KEY if KEY in saved.keys else "")
    if saved.stage != 3:  # ZeRO-1 saves frozen weights with the module alone
        state = whole_file(shards)["module"] | state
    return to_torch_tensor(state, dtype=torch.float32)


def whole_file(shards: Path) -> dict[str, Any]:
    """What ZeRO-0 to 2 save once: the module's weights, in the precision that it computes in."""
    file = shards / "mp_rank_00_model_states.pt"
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


class ZeroShards:
    """A checkpoint of ZeRO 1 to 3: flat partitions that whole tensors are put together from."""

    def __init__(self, folder: Path):
        from deepspeed.utils import zero_to_fp32 as disk

        files = disk.get_optim_files(str(folder))
        with silenced():
            self.stage, self.world, self.masters, self.paddings = disk.parse_optim_states(
                files, str(folder)
            )
            self.models = disk.parse_model_states(disk.get_model_state_files(str(folder)))
        self.states = [self.state_of(Path(file)) for file in files]
        first = self.states[0].get(0, {})
        if "step" not in first:
            raise ValueError(
                f"{str(folder)!r} lacks its optimiser's state (was it on NVMe?); resume it with"
                " the ranks and the ds_config that saved it"
            )
        self.step = float(first["step"])
        self.keys = [key for key, value in first.items() if value.ndim]

    @staticmethod
    def state_of(file: Path) -> dict[int, dict[str, Tensor]]:
        """A rank's optimiser state by partition, left on disk until it is touched."""
        shard = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
        saved = shard["optimizer_state_dict"]
        return saved.get("optimizer_state_dict", saved.get("base_optimizer_state"))["state"]

    def whole(self, key: str) -> dict[str, Any]:
        """Name -> whole tensor of that optimiser state, or of the fp32 masters where `key` is
        empty; under ZeRO-3 each is put together when its `contiguous` is called.
        """
        from deepspeed.utils import zero_to_fp32 as disk

        flat = self.masters
        if key:  # a master is saved without its padding, the state of the same index with it
            pairs = zip(self.states, self.masters, strict=True)
            flat = [[s[i][key][: len(m)] for i, m in enumerate(masters)] for s, masters in pairs]
        with silenced():
            if self.stage == 3:
                return disk._get_fp32_state_dict_from_zero3_checkpoint(
                    self.world, flat, self.models, False
                )
            return disk._get_fp32_state_dict_from_zero2_checkpoint(
                self.world, flat, self.models, False, self.paddings
            )


class PlainState:
    """A checkpoint of ZeRO-0, which saves everything whole, in the order of the groups."""

    def __init__(self, folder: Path):
        self.saved = whole_file(folder)
        optimizer = self.saved["optimizer"]
        self.states = optimizer.get("optimizer_state_dict", optimizer)["state"]
        self.masters = [m for group in optimizer.get("fp32_groups", []) for m in group]
        self.step = float(self.states[0]["step"])
        self.keys = [key for key, value in self.states[0].items() if key != "step"]

    def whole(self, key: str) -> dict[str, Any]:
        """Name -> tensor, as `ZeroShards.whole`."""
        names = self.saved["order"]
        if not key and not self.masters:
            return {name: self.saved["module"][name] for name in names}
        values = [self.states[i][key] for i in range(len(names))] if key else self.masters
        return dict(zip(names, values, strict=True))


@torch.no_grad()
def load_anew(engine: Any, shards: Path) -> None:
    """Load weights and optimiser state that other ranks or another ZeRO stage saved.

    Each parameter is put together from the shards where they lie, and every rank keeps its part of
    it. What is not trained is not loaded: this run made it as that one did.
    """
    if engine.zero_nvme_offload_optimizer():
        raise ValueError(
            "a checkpoint of other ranks or another ZeRO stage cannot be resumed with the optimiser"
            " on NVMe; offload it to the CPU, or use the ranks and the stage that saved it"
        )
    zero, stage = any(shards.glob("*_optim_states.pt")), engine.zero_optimization_stage()
    saved: ZeroShards | PlainState = ZeroShards(shards) if zero else PlainState(shards)
    begin_state(engine, saved)
    set_weight, set_state = setters(engine)
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    for key in ("", *saved.keys):
        whole = saved.whole(key)
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            value, computed_with = whole[name].contiguous(), parameter
            if stage == 3:
                computed_with = parameter.ds_tensor
                value = part_of(value, computed_with.numel())
            if key:
                set_state(parameter, value, key)
            else:
                set_weight(parameter, value)
                computed_with.copy_(value)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def begin_state(engine: Any, saved: ZeroShards | PlainState) -> None:
    """Give the optimiser the state that its first step would make, of zeros, and the saved step."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    base, zero, stage = engine.basic_optimizer, engine.optimizer, engine.zero_optimization_stage()
    weights = [p for group in base.param_groups for p in group["params"]]
    if stage in (1, 2):
        weights = zero.single_partition_of_fp32_groups
    elif stage == 3:
        weights = zero.fp32_partitioned_groups_flat
    for weight in weights:
        base.state[weight] = {key: torch.zeros_like(weight.detach()) for key in saved.keys}
        base.state[weight]["step"] = torch.tensor(saved.step, device=weight.device)
    if stage in (1, 2):
        for parameters, weight in zip(zero.bit16_groups, weights, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, weight, base.state)


def setters(engine: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What sets a parameter's fp32 master, and its optimiser state of a key, at this stage."""
    from deepspeed import utils

    if engine.zero_optimization_stage() == 3:
        # Those of whole values fail on sizes that the ranks do not divide.
        return utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
    if engine.zero_optimization_stage():
        return utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
    masters, state = whole_masters(engine.optimizer), engine.basic_optimizer.state

    def set_weight(parameter: nn.Parameter, value: Tensor) -> None:
        masters.get(parameter, parameter).copy_(value)

    def set_state(parameter: nn.Parameter, value: Tensor, key: str) -> None:
        state[masters.get(parameter, parameter)][key].copy_(value)

    return set_weight, set_state


def part_of(value: Tensor, size: int) -> Tensor:
    """This rank's `size` numbers of a flattened value, the last of them padded by zeros."""
    flat = value.flatten()[dist.rank() * size :][:size]
    return F.pad(flat, (0, size - len(flat)))


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing printed: DeepSpeed's readers tell every rank's terminal of each file and group."""
    with io.StringIO() as sink, redirect_stdout(sink), redirect_stderr(sink):
        yield
