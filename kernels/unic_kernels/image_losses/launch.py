"""Launches of the kernels of `image_losses`: tiles, grids, arguments, builds to check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
from torch import Tensor

from unic_kernels.builds import Build, build
from unic_kernels.device import config_for, contiguous_rows, on_device_of
from unic_kernels.image_losses.arguments import TERMS, BackwardArguments, ForwardArguments, Results
from unic_kernels.image_losses.kernels import (
    IMAGE_SUMS_TYPES,
    ROW_GRADS_TYPES,
    ROW_LOSSES_TYPES,
    image_sums_kernel,
    row_grads_kernel,
    row_losses_kernel,
)

WEIGHTS = tuple(f"w_{kind}_{term}" for kind in ("cls", "patch") for term in TERMS)


class Config(NamedTuple):
    """Rows and channels of a tile. A warp has whole rows, so that no sum crosses warps."""

    block_n: int
    block_c: int
    num_warps: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_N": self.block_n, "BLOCK_C": self.block_c}


CONFIGS = {80: Config(8, 256, 4), 90: Config(8, 256, 4), 100: Config(8, 256, 4)}


def forward(given: ForwardArguments) -> Results:
    """Return losses, gaps and row statistics. T + 1 launches."""
    teachers, images, patches = given.extent
    loss_TB, gap_TB22, stat_TBR3 = given.empty_results()
    config = config_for(CONFIGS, loss_TB.device)
    chunks = 1 + triton.cdiv(patches, config.block_n)
    part_TBJ3 = loss_TB.new_empty(teachers, images, chunks, 3)
    if images == 0:
        return loss_TB, gap_TB22, stat_TBR3
    with on_device_of(loss_TB):
        for teacher in range(teachers):
            row_losses_kernel[(images * chunks,)](
                **kernel_arguments(given, teacher),
                part=part_TBJ3,
                stat=stat_TBR3,
                **config.constants(),
                num_warps=config.num_warps,
            )
        block_j = triton.next_power_of_2(chunks)
        image_sums_kernel[(images, teachers)](
            part_TBJ3, loss_TB, gap_TB22, images, chunks, BLOCK_J=block_j, num_warps=1
        )
    return loss_TB, gap_TB22, stat_TBR3


def backward(both: BackwardArguments) -> list[Tensor]:
    """Return the gradients of the kinds that are learned. T launches."""
    given, stat_TBR3, grad_TB = both.forward, both.stat_TBR3, both.grad_TB
    teachers, images, patches = given.extent
    config = config_for(CONFIGS, stat_TBR3.device)
    grads = given.empty_grads()
    if images == 0:
        return grads
    chunks = 1 + triton.cdiv(patches, config.block_n)
    remaining = iter(grads)
    with on_device_of(stat_TBR3):
        for teacher in range(teachers):
            learned = given.learned[2 * teacher : 2 * teacher + 2]
            teacher_grads = [next(remaining) for taken in learned if taken]
            row_grads_kernel[(images * chunks,)](
                **kernel_arguments(given, teacher),
                stat=stat_TBR3,
                grad=grad_TB,
                stride_grad_t=grad_TB.stride(0),
                stride_grad_b=grad_TB.stride(1),
                d_cls=teacher_grads[0],
                d_patch=teacher_grads[-1],
                **config.constants(),
                num_warps=config.num_warps,
            )
    return grads


def kernel_arguments(given: ForwardArguments, teacher: int) -> dict[str, object]:
    """Return the arguments that both row kernels take, for one teacher."""
    cls_learned, patch_learned = given.learned[2 * teacher : 2 * teacher + 2]
    _, images, patches = given.extent
    found: dict[str, object] = {
        "teacher": teacher,
        "images": images,
        "patches": patches,
        "width": given.mean[teacher].shape[1],
        "cls_learned": int(cls_learned),
        "patch_learned": int(patch_learned),
        "mean": given.mean[teacher].contiguous(),
        "std": given.std[teacher].contiguous(),
        "clamp": given.clamp,
        "eps": given.eps,
    }
    for name, side in (("p", given.pred), ("x", given.target)):
        cls, patch = map(contiguous_rows, side[2 * teacher : 2 * teacher + 2])
        found[f"stride_{name}_cls_b"] = cls.stride(0) if cls_learned else 0
        found[f"stride_{name}_patch_b"] = patch.stride(0) if patch_learned else 0
        found[f"stride_{name}_patch_n"] = patch.stride(1) if patch_learned else 0
        # The tensors of a kind that is not learned may be of any type; they are not read.
        found[f"{name}_cls"] = cls if cls_learned else patch
        found[f"{name}_patch"] = patch if patch_learned else cls
    weights = given.weight[len(WEIGHTS) * teacher : len(WEIGHTS) * (teacher + 1)]
    return found | dict(zip(WEIGHTS, weights, strict=True))


def builds(arch: int) -> Iterator[Build]:
    """Yield every variant that ships for an architecture: bf16, and predictions in fp32."""
    config = CONFIGS[arch]
    constants, options = config.constants(), {"num_warps": config.num_warps}
    for pred in ("bf16", "fp32"):
        for name, kernel, types in (
            ("row_losses", row_losses_kernel, ROW_LOSSES_TYPES),
            ("row_grads", row_grads_kernel, ROW_GRADS_TYPES),
        ):
            dtypes = {"pred": pred, "target": "bf16"}
            yield build(f"{name} {pred}", kernel, types, constants, options, **dtypes)
    options = {"num_warps": 1}
    yield build("image_sums", image_sums_kernel, IMAGE_SUMS_TYPES, {"BLOCK_J": 64}, options)
