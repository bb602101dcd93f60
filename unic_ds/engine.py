"""DeepSpeed: ZeRO, precision and accumulation; the only module that imports it."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds import config, dist, ds_config, optim
from unic_ds.average import KEY, AveragedAdamW, in_place_of_weights

Module = TypeVar("Module", bound=nn.Module)


def create(make: Callable[[], Module], settings: dict[str, Any]) -> Module:
    """What `make` makes; under ZeRO-3 no rank ever holds all of it.

    Each parameter is partitioned at the end of its module's constructor, in the precision of the
    settings; what else is computed there stays in fp32, as under the other stages. Values written
    later are written through `whole`.
    """
    if ds_config.stage(settings) < 3:
        return make()
    deepspeed = load_deepspeed()
    # Before DeepSpeed knows of the ranks, zero.Init takes the settings to be one rank's.
    backend = deepspeed.accelerator.get_accelerator().communication_backend_name()
    deepspeed.init_distributed(backend, dist_init_required=False)
    init: Any = deepspeed.zero.Init

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
    wanted = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return to_torch_tensor(wanted, dtype=torch.float32)


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


def order(engine: Any) -> list[str]:
    """Trained weights in the order that ZeRO-0 saves their state in, which it saves no names of."""
    if engine.zero_optimization_stage():
        return []
    masters = whole_masters(engine.optimizer)
    names = {masters.get(p, p): name for name, p in engine.module.named_parameters()}
    return [names[p] for group in engine.basic_optimizer.param_groups for p in group["params"]]


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


def copies(engine: Any) -> int:
    """fp32 numbers that a checkpoint holds for each weight: itself, two moments, an average."""
    return 4 if isinstance(engine.basic_optimizer, AveragedAdamW) else 3


def guard(engine: Any, skip: Callable[[Tensor | float], Tensor]) -> None:
    """Let the optimiser ask before each of its steps whether to leave everything as it is.

    `skip` is told the gradient's norm over all ranks and says 1 or 0 on the device. DeepSpeed
    refuses gradients that are not finite by itself under most settings; then `skip` is not asked.
    """
    whole, inner = engine.optimizer, engine.basic_optimizer

    def ask(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = own_norm(weights) if whole is inner else whole._global_grad_norm
        optimizer.found_inf = skip(norm).to(weights[0].device)  # type: ignore[attr-defined]

    # Where a part of the state is offloaded, DeepSpeed steps the rest by an AdamW of its own.
    for optimizer in filter(None, (inner, getattr(whole, "backup_optimizer", None))):
        optimizer.register_step_pre_hook(ask)


def own_norm(weights: list[Tensor]) -> Tensor:
    """The gradient's norm where DeepSpeed takes none: under ZeRO-0 in fp32."""
    return nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])


def release(engine: Any) -> None:
    """Free what training holds; the engine cannot be used again.

    ZeRO-3 makes autograd functions of the modules, which torch keeps for ever, so references to
    what is large are cut.
    """
    engine.destroy()
    for parameter in engine.module.parameters():
        vars(parameter).clear()  # what DeepSpeed hung there: a rank's part, the optimiser
        parameter.data, parameter.grad = torch.empty(0, dtype=parameter.dtype), None
    vars(engine).clear()


def grad_norm(engine: Any) -> Tensor | float | None:
    """The last step's gradient norm over all ranks as DeepSpeed kept it, if it did; not read."""
    return engine.get_global_grad_norm()
