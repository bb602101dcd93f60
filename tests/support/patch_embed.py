"""A patch embedding as a convolution, as timm computes it, beside reshape and a linear layer.

    python tests/support/patch_embed.py         a table: ViT-g at 336 px in bf16, batches of 32
    python tests/support/patch_embed.py --json  a line of JSON, of which the first hour makes a row

Both have the same weights and the same output within rounding. Convolutions of three channels may
be slow on a GPU; the models keep theirs until this has measured it there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor
from torch.nn import functional as F

WIDTH, PATCH, SIZE, BATCH = 1536, 14, 336, 32
"""ViT-g/14 at 336 px, a micro batch."""
SMALL = {"width": 384, "size": 112, "batch": 2}
"""Instead of these on a CPU."""


def measure(
    device: torch.device,
    *,
    width: int = WIDTH,
    size: int = SIZE,
    batch: int = BATCH,
    rounds: int = 20,
) -> dict[str, Any]:
    """Median milliseconds of both ways, forward, and forward and backward to the weights."""
    torch.manual_seed(0)
    embed = PatchEmbed(size, PATCH, 3, width).to(device, torch.bfloat16)
    image_B3HW = torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)
    ways: dict[str, Callable[[], Tensor]] = {
        "conv": lambda: embed(image_B3HW),
        "linear": lambda: linear(embed, image_B3HW),
    }
    conv_BND, linear_BND = (way().detach().float() for way in ways.values())
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "dtype": "bf16",
        "shape": {"batch": batch, "size": size, "patch": PATCH, "width": width},
        "largest_difference": (conv_BND - linear_BND).abs().max().item(),
    }
    for suffix, run in (("", forward), ("_backward", forward_backward)):
        conv, flat = (timed(partial(run, way), device, rounds) for way in ways.values())
        result |= {f"conv{suffix}_ms": conv, f"linear{suffix}_ms": flat}
        result[f"ratio{suffix}"] = conv / flat
    return result


def linear(embed: PatchEmbed, image_B3HW: Tensor) -> Tensor:
    """Tokens [B, N, D] of a patch embedding by one GEMM over its patches' pixels."""
    patch, batch = embed.patch_size[0], len(image_B3HW)
    cut_B3YPXP = image_B3HW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    pixel_BNP = cut_B3YPXP.permute(0, 2, 4, 1, 3, 5).reshape(batch, embed.num_patches, -1)
    return F.linear(pixel_BNP, embed.proj.weight.flatten(1), embed.proj.bias)


def forward(way: Callable[[], Tensor]) -> None:
    """Compute tokens as a frozen teacher does."""
    with torch.no_grad():
        way()


def forward_backward(way: Callable[[], Tensor]) -> None:
    """Compute tokens and the weights' gradients as the student does."""
    way().sum().backward()


def timed(run: Callable[[], None], device: torch.device, rounds: int) -> float:
    """Median milliseconds of a call after a few that are not counted."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = []
    for _ in range(rounds + 3):
        wait()
        start = time.perf_counter()
        run()
        wait()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[3:])


def main() -> None:
    """Measure on the GPU, or a smaller case on the CPU, and print."""
    parser = argparse.ArgumentParser(
        prog="python tests/support/patch_embed.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    result = measure(torch.device("cuda")) if gpu else measure(torch.device("cpu"), **SMALL)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['device']}, torch {result['torch']}, {result['dtype']}, {result['shape']}")
    for suffix, what in (("", "forward"), ("_backward", "forward + backward")):
        conv, flat = (result[f"{name}{suffix}_ms"] for name in ("conv", "linear"))
        print(f"{what}: conv {conv:.2f} ms, linear {flat:.2f} ms, {conv / flat:.2f} times")


if __name__ == "__main__":
    main()
