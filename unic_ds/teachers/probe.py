"""Probes a teacher with two black images: its width and grid, or the reason to refuse it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from unic_ds import config
from unic_ds.files.printable import printable
from unic_ds.teachers.adapters import NotTokens
from unic_ds.tokens import KINDS, Tokens

DTYPE = {
    "fp32": torch.float32,
    **dict.fromkeys(("bf16", "int8", "fp8", "int8_dynamic", "fp8_dynamic"), torch.bfloat16),
}
"""The type that a teacher computes in, by its precision."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PLAIN = (RuntimeError, ValueError, AssertionError)
"""Exceptions whose text is clear without their type."""


@torch.no_grad()
def measure(
    row: config.Teacher,
    size: int,
    encode: Callable[[Tensor], Tokens],
    *,
    device: torch.device,
    single: bool = False,
) -> tuple[int, int]:
    """(width, side of the own grid) of a teacher; `encode` maps uint8 images to its tokens.

    ValueError, naming the teacher, unless two images give tokens [2, C] and [2, N, C], N a square.
    With `single` one image alone must give the same.
    """
    counts = (2, 1) if single else (2,)
    found = [shape_of(row, size, encode, count, device) for count in counts]
    if len(set(found)) > 1:
        (width, side), (width1, side1) = found
        raise ValueError(
            f"teacher {row.name!r} gives {side**2} tokens of width {width} for each of two images"
            f" but {side1**2} of width {width1} for one alone; they must not depend on the batch"
        )
    return found[0]


def shape_of(
    row: config.Teacher,
    size: int,
    encode: Callable[[Tensor], Tokens],
    count: int,
    device: torch.device,
) -> tuple[int, int]:
    """(width, side of the own grid) of the tokens of `count` images; ValueError as `measure`."""
    try:
        black_B3HW = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=device)
        tokens = encode(black_B3HW)
        check_kind(tokens, black_B3HW.device)
    except torch.OutOfMemoryError:
        raise
    except NotTokens as error:
        raise ValueError(f"teacher {row.name!r} {error}") from None
    except Exception as exc:  # foreign code may fail in any way; name it
        images = "an image" if count == 1 else f"a batch of {count} images"
        raise ValueError(
            f"teacher {row.name!r} fails on {images} of {size} px: {first_line(exc)} ({place(exc)})"
        ) from exc
    cls_BC, patch_BNC = tokens
    side = round(patch_BNC.shape[1] ** 0.5) if patch_BNC.ndim == 3 else 0
    if cls_BC.ndim != 2 or not side or patch_BNC.shape != (count, side**2, cls_BC.shape[-1]):
        got = f"cls {tuple(cls_BC.shape)} and patch {tuple(patch_BNC.shape)}"
        raise ValueError(
            f"teacher {row.name!r} gives {got} for {count} images; it must be [B, C] and"
            " [B, N, C], N a square"
        )
    return patch_BNC.shape[2], side


def check_kind(tokens: Tokens, device: torch.device) -> None:
    """NotTokens unless both are dense floating tensors without gradient on `device`."""
    for kind, x in zip(KINDS, tokens, strict=True):
        if x.dtype not in FLOATS or x.layout != torch.strided or x.is_nested:
            what = f"{x.dtype}, {x.layout}".replace("torch.", "")
            raise NotTokens(f"gives {kind} as {what}; it must be a dense tensor of floats")
        if x.device != device:
            raise NotTokens(f"gives {kind} on {x.device} for images on {device}; move it there")
        if x.requires_grad:
            raise NotTokens(f"gives {kind} that requires grad; detach it: teachers are frozen")


def place(exc: Exception) -> str:
    """File and line that raised an exception, for a module's author."""
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    return f"{printable(Path(frame.filename).name)}, line {frame.lineno}"


def first_line(exc: Exception) -> str:
    """The start of an error's text; a strict load can name hundreds of keys."""
    text = printable(" ".join(str(exc).split()), 300)
    kind = type(exc).__name__
    return (text if isinstance(exc, PLAIN) and text else f"{kind}: {text}").removesuffix(": ")
