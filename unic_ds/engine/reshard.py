"""Load a checkpoint of another number of ranks or ZeRO stage: gather its shards, shard again."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import dist
from unic_ds.engine.deepspeed_engine import full_masters, load_deepspeed
from unic_ds.engine.ema import KEY
from unic_ds.engine.protocol import Engine


def weights(shards: Path) -> dict[str, Tensor]:
    """Weights from a checkpoint's shards, as `deepspeed_engine.weights`, by their full names."""
    if not any(shards.glob("*_optim_states.pt")):
        raise ValueError(
            f"{str(shards)!r} was saved under ZeRO-0, whose checkpoints hold no shards to read;"
            " the training command itself exports at its end"
        )
    saved = ZeroShards(shards)
    state = saved.full(KEY if KEY in saved.keys else "")
    if saved.stage != 3:  # ZeRO-1 saves frozen weights with the module alone
        state = read_model_states(shards)["module"] | state
    return shard_reader().to_torch_tensor(state, dtype=torch.float32)


def shard_reader() -> ModuleType:
    """DeepSpeed's module that reads the shards of a checkpoint."""
    from deepspeed.utils import zero_to_fp32

    return zero_to_fp32


def read_model_states(shards: Path) -> dict[str, Any]:
    """The file that ZeRO-0 to 2 save once: the module's weights, in its compute precision."""
    file = shards / "mp_rank_00_model_states.pt"
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


class ZeroShards:
    """A checkpoint of ZeRO 1 to 3: flat partitions, from which full tensors are gathered."""

    def __init__(self, folder: Path):
        disk = shard_reader()
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

    def full(self, key: str) -> dict[str, Any]:
        """Full tensors of an optimiser state by name, or of the fp32 masters if `key` is empty.

        Under ZeRO-3 each is gathered when its `contiguous` is called.
        """
        disk, flat = shard_reader(), self.masters
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
    """A checkpoint of ZeRO-0, which saves full tensors, in the order of the groups."""

    def __init__(self, folder: Path):
        self.saved = read_model_states(folder)
        optimizer = self.saved["optimizer"]
        self.states = optimizer.get("optimizer_state_dict", optimizer)["state"]
        self.masters = [m for group in optimizer.get("fp32_groups", []) for m in group]
        self.step = float(self.states[0]["step"])
        self.keys = [key for key, value in self.states[0].items() if key != "step"]

    def full(self, key: str) -> dict[str, Any]:
        """Full tensors by name, as `ZeroShards.full`."""
        names = self.saved["order"]
        if not key and not self.masters:
            return {name: self.saved["module"][name] for name in names}
        values = [self.states[i][key] for i in range(len(names))] if key else self.masters
        return dict(zip(names, values, strict=True))


@torch.no_grad()
def load_resharded(engine: Engine[nn.Module], shards: Path) -> None:
    """Load weights and optimiser state of another number of ranks or ZeRO stage.

    Each parameter is gathered from the shards on disk, and every rank keeps its partition of it.
    Frozen weights are not loaded: this run initialised them as that one did.
    """
    if engine.zero_nvme_offload_optimizer():
        raise ValueError(
            "a checkpoint of other ranks or another ZeRO stage cannot be resumed with the optimiser"
            " on NVMe; offload it to the CPU, or use the ranks and the stage that saved it"
        )
    zero, stage = any(shards.glob("*_optim_states.pt")), engine.zero_optimization_stage()
    saved: ZeroShards | PlainState = ZeroShards(shards) if zero else PlainState(shards)
    init_optimizer_state(engine, saved)
    set_weight, set_state = setters(engine)
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    for key in ("", *saved.keys):
        full = saved.full(key)
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            value: Tensor = full[name].contiguous()
            computed_with: Any = parameter
            if stage == 3:
                computed_with = computed_with.ds_tensor
                value = local_partition(value, computed_with.numel())
            if key:
                set_state(parameter, value, key)
            else:
                set_weight(parameter, value)
                computed_with.copy_(value)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def init_optimizer_state(engine: Engine[nn.Module], saved: ZeroShards | PlainState) -> None:
    """Initialise the optimiser's state as its first step would, with zeros and the saved step."""
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
            load_deepspeed().utils.lazy_init_hp_params_optimizer_state(
                parameters, weight, base.state
            )


def setters(engine: Engine[nn.Module]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Functions that set a parameter's fp32 master, and its optimiser state, at this stage."""
    utils = load_deepspeed().utils
    if engine.zero_optimization_stage() == 3:
        # The functions for full values fail on sizes that the ranks do not divide.
        return utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state
    if engine.zero_optimization_stage():
        return utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state
    masters, state = full_masters(engine.optimizer), engine.basic_optimizer.state

    def set_weight(parameter: nn.Parameter, value: Tensor) -> None:
        masters.get(parameter, parameter).copy_(value)

    def set_state(parameter: nn.Parameter, value: Tensor, key: str) -> None:
        state[masters.get(parameter, parameter)][key].copy_(value)

    return set_weight, set_state


def local_partition(value: Tensor, size: int) -> Tensor:
    """This rank's `size` numbers of a flattened value, padded with zeros at its end."""
    flat = value.flatten()[dist.rank() * size :][:size]
    return F.pad(flat, (0, size - len(flat)))


@contextmanager
def silenced() -> Iterator[None]:
    """Context manager that drops output: DeepSpeed's readers print each file and group."""
    with io.StringIO() as sink, redirect_stdout(sink), redirect_stderr(sink):
        yield
