"""The method once more, written plainly in fp64 and without unic_ds: vectors of any seed and size.

They have the layout of the published vectors (method: section 7), `published_format.pth` included,
whose weights are random.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Source:
    """Random fp32 tensors of one seed; fp64 copies of them are what is computed with."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale


def numpy_of(value: Tensor) -> np.ndarray:
    return value.detach().float().numpy()


def write_loss(file: Path, *, seed: int, sizes: list[dict[str, Any]]) -> None:
    """A case of losses for each of `sizes`: teachers' widths, images, patches, drop."""
    source, arrays = Source(seed), {}
    for number, size in enumerate(sizes):
        case = loss_case(source, **size)
        arrays |= {f"case{number}_{key}": value for key, value in case.items()}
    np.savez(file, **arrays)


def loss_case(
    source: Source, *, widths: dict[str, int], images: int, patches: int, drop: float
) -> dict[str, Any]:
    take: dict[str, Any] = {"teachers": np.array(list(widths)), "drop_prob": np.float64(drop)}
    leaves, rows = {}, []
    for name, width in widths.items():
        total_B = torch.zeros(images, dtype=torch.double)
        for kind, shape in (("cls", (images, width)), ("patch", (images, patches, width))):
            pred, target = source(*shape), source(*shape, scale=1.5)
            take |= {f"pred_{name}_{kind}": pred.numpy(), f"target_{name}_{kind}": target.numpy()}
            leaf = leaves[f"{name}_{kind}"] = pred.double().requires_grad_()
            per_token = token_loss(leaf, target.double())
            total_B = total_B + 0.5 * (per_token if kind == "cls" else per_token.mean(1))
        rows.append(total_B)
    loss_TB = torch.stack(rows)
    uniform_TB = torch.rand(len(widths), images, generator=source.generator, dtype=torch.double)
    kept = []
    for image in range(images):
        hardest = int(loss_TB[:, image].argmax())
        uniform_TB[hardest, image] = math.nan
        kept += [
            (teacher, image)
            for teacher in range(len(widths))
            if teacher == hardest or uniform_TB[teacher, image] >= drop
        ]
    loss = sum(loss_TB[pair] for pair in kept) / len(kept)
    loss.backward()
    coeff_T = [sum(t == teacher for t, _ in kept) / len(kept) for teacher in range(len(widths))]
    take |= {"uniform_TB": uniform_TB.numpy(), "loss_TB": numpy_of(loss_TB)}
    take |= {"loss": np.float64(loss.item()), "coeff_T": np.array(coeff_T)}
    zeros = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
    return take | {
        f"grad_{key}": numpy_of(zeros[key] if leaf.grad is None else leaf.grad)
        for key, leaf in leaves.items()
    }


def token_loss(pred_C: Tensor, target_C: Tensor) -> Tensor:
    """0.5 (1 - cos) + 0.5 mean Huber (beta 1)."""
    dot = (pred_C * target_C).sum(-1)
    cosine = dot / (pred_C.square().sum(-1).sqrt() * target_C.square().sum(-1).sqrt())
    apart = (pred_C - target_C).abs()
    huber = torch.where(apart < 1, 0.5 * apart.square(), apart - 0.5).mean(-1)
    return 0.5 * (1 - cosine) + 0.5 * huber


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    rest = x - x.mean(-1, keepdim=True)
    scaled = rest / (rest.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def ladder_weights(
    source: Source,
    *,
    width: int,
    blocks: list[int],
    last: int,
    widths: dict[str, int],
    hidden: tuple[int, int],
    prenorm: bool = False,
    midnorm: bool = False,
) -> dict[str, Tensor]:
    """Projectors in the published names; of `hidden` the second is the width of block `last`."""
    weights = {}
    for name, out in widths.items():
        for kind in ("cls", "patch"):
            for block in blocks:
                size, layers = hidden[block == last], []
                layers += [(width,)] if prenorm else []
                layers += [(size, width)] + ([(size,)] if midnorm else []) + [None, (out, size)]
                for i, shape in enumerate(layers):
                    if shape is None:  # the GELU
                        continue
                    at = f"heads.{name}.{kind}.{block}.layers.{i}"
                    weights[f"{at}.weight"] = source(*shape, scale=0.3)
                    weights[f"{at}.bias"] = source(shape[0], scale=0.3)
    return weights


def project(x: Tensor, weights: dict[str, Tensor], at: str) -> Tensor:
    """One projector on one rung's tokens, layer after layer as the names say."""
    layers = sorted(
        {int(k[len(at) + 8 :].split(".")[0]) for k in weights if k.startswith(f"{at}.")}
    )
    for i in layers:
        if i == layers[-1]:
            x = gelu(x)
        name = f"{at}.layers.{i}"
        flat = weights[f"{name}.weight"].ndim == 1
        x = layer_norm(x, weights, name, 1e-5) if flat else linear(x, weights, name)
    return x


def climb(
    weights: dict[str, Tensor], states: dict[str, Tensor], blocks: list[int], name: str, kind: str
) -> Tensor:
    """The sum of the rungs; block b writes state b + 1."""
    at = f"heads.{name}.{kind}"
    return sum(project(states[f"{kind}{b + 1}"], weights, f"{at}.{b}") for b in blocks)


def write_ladder(file: Path, *, seed: int, sizes: list[dict[str, Any]]) -> None:
    """A case of ladders for each of `sizes`."""
    source, arrays = Source(seed), {}
    for number, size in enumerate(sizes):
        case = ladder_case(source, **size)
        arrays |= {f"case{number}_{key}": value for key, value in case.items()}
    np.savez(file, **arrays)


def ladder_case(
    source: Source,
    *,
    width: int,
    depth: int,
    widths: dict[str, int],
    hidden: tuple[int, int],
    blocks: list[int] | None = None,
    **norms: bool,
) -> dict[str, Any]:
    rungs = blocks or list(range(depth))
    weights = ladder_weights(
        source, width=width, blocks=rungs, last=depth - 1, widths=widths, hidden=hidden, **norms
    )
    states = {
        f"{kind}{k}": source(*shape)
        for k in range(depth + 1)
        for kind, shape in (("cls", (3, width)), ("patch", (3, 5, width)))
    }
    take = {f"w:{k}": v.numpy() for k, v in weights.items()}
    take |= {f"x_{k}": v.numpy() for k, v in states.items()}
    w, x = (
        {k: v.double().requires_grad_() for k, v in given.items()} for given in (weights, states)
    )
    for name in widths:
        for kind in ("cls", "patch"):
            y = climb(w, x, rungs, name, kind)
            gy = source(*y.shape)
            y.backward(gy.double())
            take |= {f"y_{name}_{kind}": numpy_of(y), f"gy_{name}_{kind}": gy.numpy()}
    take |= {f"gw:{k}": numpy_of(v.grad) for k, v in w.items()}
    take |= {f"gx_{k}": numpy_of(v.grad) for k, v in x.items() if v.grad is not None}
    settings = {"hidden_dim": hidden[0], "last_hidden_dim": hidden[1]} | norms
    settings |= {"which_blocks": blocks} if blocks else {}
    return take | {"config": np.array(json.dumps(settings))}


def write_standardise(file: Path, *, seed: int, steps: int, width: int) -> None:
    """Consecutive steps of running standardisation."""
    source, arrays = Source(seed), {}
    for kind, shape in (("cls", (7, width)), ("patch", (7, 4, width))):
        mean, std = torch.zeros(width, dtype=torch.double), torch.ones(width, dtype=torch.double)
        for i in range(steps):
            x, m = source(*shape, scale=2.0) + 1, 1 / (1 + i)
            rows = x.double().reshape(-1, width)
            y = (x.double() - mean) / (std + 1e-6)
            mean = (1 - m) * mean + m * rows.mean(0)
            spread = ((rows - rows.mean(0)).square().sum(0) / (len(rows) - 1)).sqrt()
            std = (1 - m) * std + m * (spread + 1e-6)
            at = f"{kind}{i}"
            arrays |= {f"{at}_x": x.numpy(), f"{at}_y": numpy_of(y), f"{at}_momentum": np.array(m)}
            arrays[f"{at}_mean_after"] = numpy_of(mean).reshape([1] * (x.ndim - 1) + [width])
            arrays[f"{at}_std_after"] = numpy_of(std).reshape([1] * (x.ndim - 1) + [width])
    np.savez(file, **arrays)


def write_schedules(file: Path, **schedules: dict[str, float]) -> None:
    """Warm-up and cosine of each schedule's arguments."""
    rows = {}
    for name, args in schedules.items():
        a_epoch = args["niter_per_ep"]
        warm, steps = args["warmup_epochs"] * a_epoch, args["epochs"] * a_epoch
        start = [args["base_value"] * i / max(warm - 1, 1) for i in range(warm)]
        half = (args["base_value"] - args["final_value"]) / 2
        rest = [
            args["final_value"] + half * (1 + math.cos(math.pi * i / (steps - warm)))
            for i in range(steps - warm)
        ]
        rows[name] = {"args": args, "values": start + rest}
    file.write_text(json.dumps(rows))


def specimen(
    seed: int,
    *,
    widths: dict[str, int],
    hidden: tuple[int, int] = (8, 16),
    blocks: list[int] | None = None,
    grid: int = 4,
    **norms: bool,
) -> dict[str, Any]:
    """A checkpoint of random weights in the published layout: a ViT-Ti/16 and its ladder."""
    source, width, depth = Source(seed), 192, 12
    encoder = {
        "cls_token": source(1, 1, width),
        "pos_embed": source(1, 1 + grid * grid, width, scale=0.5),
        "mask_token": source(1, width),
        "patch_embed.proj.weight": source(width, 3, 16, 16, scale=0.05),
        "patch_embed.proj.bias": source(width, scale=0.1),
    }
    shapes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in range(depth):
        at = f"blocks.0.{block}"  # one chunk of all blocks
        for name in ("norm1", "norm2"):
            encoder[f"{at}.{name}.weight"] = 1 + source(width, scale=0.1)
            encoder[f"{at}.{name}.bias"] = source(width, scale=0.1)
        for name, (out, into) in shapes.items():
            encoder[f"{at}.{name}.weight"] = source(out * width, into * width, scale=0.05)
            encoder[f"{at}.{name}.bias"] = source(out * width, scale=0.05)
    encoder |= {"norm.weight": 1 + source(width, scale=0.1), "norm.bias": source(width, scale=0.1)}
    ladder = ladder_weights(
        source,
        width=width,
        blocks=blocks or list(range(depth)),
        last=depth - 1,
        widths=widths,
        hidden=hidden,
        **norms,
    )
    model = {f"module.encoder.{k}": v for k, v in encoder.items()}
    model |= {f"module.lp.{k}": v for k, v in ladder.items()}
    statistics = {
        name: {
            kind: {"mean": source(*one, out), "std": source(*one, out).abs() + 0.1}
            for kind, one in (("cls", (1,)), ("patch", (1, 1)))
        }
        for name, out in widths.items()
    }
    args = argparse.Namespace(
        arch="vit_tiny", lr_schedule=np.linspace(0, 1, 5), sizes=np.arange(3), teachers=[*widths]
    )
    return {
        "model": OrderedDict(model),
        "teacher_ft_stats": statistics,
        "optimizer": {},
        "epoch": 200,
        "args": args,
    }


def outputs(checkpoint: dict[str, Any], image_B3HW: Tensor) -> dict[str, np.ndarray]:
    """Expected outputs for these normalised images, as in `published_format_io.npz`."""
    model = {k.removeprefix("module."): v.double() for k, v in checkpoint["model"].items()}
    w = {k.removeprefix("encoder."): v for k, v in model.items()}
    weights = {k.removeprefix("lp."): v for k, v in model.items() if k.startswith("lp.")}
    x, states = embed(w, image_B3HW.double()), {}
    for block in range(12):
        at = f"blocks.0.{block}"
        x = x + attend(layer_norm(x, w, f"{at}.norm1", 1e-6), w, f"{at}.attn", heads=3)
        inner = gelu(linear(layer_norm(x, w, f"{at}.norm2", 1e-6), w, f"{at}.mlp.fc1"))
        x = x + linear(inner, w, f"{at}.mlp.fc2")
        states |= {f"cls{block + 1}": x[:, 0], f"patch{block + 1}": x[:, 1:]}
    x = layer_norm(x, w, "norm", 1e-6)
    found = {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 1:]}
    for name in checkpoint["teacher_ft_stats"]:
        for kind in ("cls", "patch"):
            blocks = sorted({int(k.split(".")[3]) for k in weights})
            found[f"y_{name}_{kind}"] = climb(weights, states, blocks, name, kind)
    return {"image": image_B3HW.numpy()} | {k: numpy_of(v) for k, v in found.items()}


def embed(w: dict[str, Tensor], image_B3HW: Tensor) -> Tensor:
    """CLS and patches with their position embeddings."""
    kernel = w["patch_embed.proj.weight"].flatten(1)
    pixels = image_B3HW.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
    patches = pixels.flatten(3).flatten(1, 2) @ kernel.T + w["patch_embed.proj.bias"]
    tokens = torch.cat([w["cls_token"].expand(len(patches), -1, -1), patches], 1)
    return tokens + w["pos_embed"]


def attend(x: Tensor, w: dict[str, Tensor], at: str, *, heads: int) -> Tensor:
    """Multi-head self-attention."""
    q, k, v = linear(x, w, f"{at}.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return linear((scores @ v).transpose(1, 2).flatten(2), w, f"{at}.proj")


def write_published(folder: Path, *, seed: int, grid: int = 4, **size: Any) -> dict[str, Any]:
    """`published_format.pth` and `published_format_io.npz` of a specimen; the checkpoint."""
    checkpoint = specimen(seed, grid=grid, **size)
    torch.save(checkpoint, folder / "published_format.pth")
    image_B3HW = Source(seed + 1)(2, 3, 16 * grid, 16 * grid)
    np.savez(folder / "published_format_io.npz", **outputs(checkpoint, image_B3HW))
    return checkpoint
