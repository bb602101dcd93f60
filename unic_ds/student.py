"""The student: a timm ViT whose blocks feed a ladder of projectors; only the ViT is exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import timm
import torch
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unic_ds import chance, config, override
from unic_ds.compiled import compile_each
from unic_ds.ladder import Head, Ladder
from unic_ds.ops import FUSED, Ops
from unic_ds.tokens import Normalise, Tokens, split_prefix

NO_REGISTERS = (
    "student.registers {} cannot be had of {!r}; leave it -1, or choose a plain vit_ model"
)


Whole = Callable[[nn.Parameter], AbstractContextManager[bool]]
"""Makes all of a parameter be there for a body, and says whether what is written then counts."""


class DropPath(nn.Module):
    """Stochastic depth whose decisions are given, so that ranks, restarts and recomputation agree.

    timm's own draws from each rank's generator. `scale_B` is 0 (dropped) or 1 / (1 - rate) per
    image.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.scale_B: Tensor | None = None

    def forward(self, x_BND: Tensor) -> Tensor:
        if not self.training or self.scale_B is None:
            return x_BND
        return x_BND * self.scale_B.to(x_BND.dtype).view(-1, 1, 1)


class Student(nn.Module):
    """Encoder and ladder: uint8 images in, a prediction per teacher out."""

    def __init__(
        self,
        cfg: config.Student,
        ladder: config.Ladder,
        heads: Mapping[str, Head],
        *,
        seed: int,
        ops: Ops = FUSED,
        whole: Whole = lambda _: nullcontext(True),
        compiled: bool = False,
    ):
        """`heads` is keyed by teacher; weights are a function of (seed, published name).

        `compiled`: blocks run through torch.compile.
        """
        super().__init__()
        self.encoder = build_encoder(cfg)
        self.normalise = Normalise(cfg.mean, cfg.std)
        self.ladder = ladder_on(self.encoder, ladder, heads, ops)
        self.paths = give_drop_paths(self.encoder)
        for parameter, regions in self.parts():
            with whole(parameter) as ours:
                if ours:
                    initialise({name: parameter[at] for name, at in regions.items()}, seed)
        freeze_after_blocks(self.encoder)
        if compiled:
            compile_each(self.encoder.blocks)
        self.recomputed = recompute(self.encoder.blocks, cfg.checkpoint)

    def parts(self) -> Iterator[tuple[nn.Parameter, dict[str, tuple[slice, ...]]]]:
        """Every parameter with the published names of what it holds, and where."""
        for name, parameter in self.encoder.named_parameters():
            yield parameter, {f"encoder.{name}": ()}
        for name, regions in self.ladder.parts().items():
            at = {f"ladder.{published}": region for published, region in regions.items()}
            yield self.ladder.get_parameter(name), at

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by its published name; the ladder's are views."""
        return {name: p[at] for p, regions in self.parts() for name, at in regions.items()}

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        return self.encoder.patch_embed.proj.weight.dtype

    def forward(self, image_B3HW: Tensor, path_BK: Tensor | None = None) -> dict[str, Tokens]:
        """Predictions per teacher; `path_BK` are drop-path's uniforms, one per image and residual
        branch.
        """
        if path_BK is not None:
            for path, uniform_B in zip(self.paths, path_BK.unbind(1), strict=True):
                path.scale_B = (uniform_B >= path.rate).float() / (1 - path.rate)
        states = self.encoder.forward_intermediates(
            self.normalise(image_B3HW, self.dtype),
            indices=self.ladder.blocks,
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return self.ladder([self.tokens(state) for state in states])

    def tokens(self, state: Any) -> Tokens:
        """Tokens of one block's residual stream; the mean of the patches where there is no CLS.

        timm gives (patches, prefix tokens), or the patches alone where the model has no prefix.
        """
        patch_BND, prefix_BRD = state if isinstance(state, tuple) else (state, None)
        if prefix_BRD is None or not has_cls(self.encoder):
            return Tokens(patch_BND.mean(1), patch_BND)
        return Tokens(prefix_BRD[:, 0], patch_BND)

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tokens:
        """Exported features: tokens after the final norm."""
        x_BND = self.encoder.forward_features(self.normalise(image_B3HW, self.dtype))
        return split_prefix(x_BND, self.encoder.num_prefix_tokens, has_cls=has_cls(self.encoder))


def ladder_on(
    encoder: Any, cfg: config.Ladder, heads: Mapping[str, Head], ops: Ops = FUSED
) -> Ladder:
    """The ladder that stands on an encoder's blocks."""
    return Ladder(
        encoder.embed_dim,
        len(encoder.blocks),
        heads,
        cfg,
        attention_heads=encoder.blocks[0].attn.num_heads,
        ops=ops,
    )


def arguments(cfg: config.Student) -> dict[str, Any]:
    """What timm is told beside the model's name, whoever builds the encoder."""
    registers = {"reg_tokens": cfg.registers} if cfg.registers >= 0 else {}
    return {"img_size": cfg.size, "num_classes": 0} | registers


def build_encoder(cfg: config.Student) -> Any:
    """A timm ViT without a head at `cfg.size`; ValueError for what timm does not have or take."""
    if not timm.is_model(cfg.model):
        near = override.nearest(cfg.model, timm.list_models("*vit*"))
        raise ValueError(f"student.model {cfg.model!r} is not a timm model{near}")
    try:
        encoder: Any = timm.create_model(cfg.model, drop_path_rate=cfg.drop_path, **arguments(cfg))
    except (TypeError, AssertionError) as error:
        if "reg_tokens" in str(error):
            raise ValueError(NO_REGISTERS.format(cfg.registers, cfg.model)) from error
        raise ValueError(f"student.model {cfg.model!r} at {cfg.size} px: {error}") from error
    if not (hasattr(encoder, "blocks") and hasattr(encoder, "num_prefix_tokens")):
        raise ValueError(
            f"student.model {cfg.model!r} is not a plain ViT; choose one of timm's vit_ models"
        )
    if cfg.registers not in (-1, encoder.num_prefix_tokens - has_cls(encoder)):
        raise ValueError(NO_REGISTERS.format(cfg.registers, cfg.model))
    patch = encoder.patch_embed.patch_size[0]
    if cfg.size % patch:
        raise ValueError(
            f"student.size {cfg.size} is not a multiple of {cfg.model}'s patch size {patch}"
        )
    return encoder


@cache
def grid_of(cfg: config.Student) -> int:
    """Side of the student's patch grid, without building its weights."""
    with torch.device("meta"):
        return build_encoder(cfg).patch_embed.grid_size[0]


def give_drop_paths(encoder: nn.Module) -> list[DropPath]:
    """Replace timm's DropPath modules by ours, in the order that the branches run."""
    paths = []
    for parent in list(encoder.modules()):
        for name, child in parent.named_children():
            if isinstance(child, TimmDropPath):
                paths.append(DropPath(child.drop_prob or 0.0))
                setattr(parent, name, paths[-1])
    return paths


def recompute(blocks: nn.Sequential, which: str) -> list[nn.Module]:
    """Keep only the inputs of `which` blocks (none, full, every:K) for backward; these blocks.

    Their random decisions are given (`DropPath`), so no generator's state need be kept.
    """
    kind, _, every = which.partition(":")
    if kind == "none":
        return []
    chosen = list(blocks)[:: int(every or 1)]
    for block in chosen:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    return chosen


def freeze_after_blocks(encoder: nn.Module) -> None:
    """Freeze what stands behind the blocks: no gradient gets there, yet exports pass the norm.

    Kept at its initial affine, so that export = LayerNorm without scale (method: section 2).
    """
    for name in ("norm", "fc_norm", "attn_pool"):
        if isinstance(behind := getattr(encoder, name, None), nn.Module):
            behind.requires_grad_(False)


def has_cls(encoder: Any) -> bool:
    """Whether the encoder's first token is a CLS token."""
    return getattr(encoder, "cls_token", None) is not None


@torch.no_grad()
def initialise(weights: Mapping[str, Tensor], seed: int) -> None:
    """Give every weight the initial value that its (seed, name) says, on any rank and stage.

    Weights and position embeddings: normal of std 0.02, cut at -2 and 2 as timm does; CLS and
    register tokens: std 1e-6; biases 0; norms and layer scales stay at the constants they were
    built with. All are drawn on the CPU: under ZeRO-3 a weight is born on its GPU, whose generator
    would draw others.
    """
    for name, parameter in weights.items():
        if parameter.is_meta:
            continue
        generator = torch.Generator().manual_seed(chance.number(seed, name))
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith(("cls_token", "reg_token")):
            parameter.copy_(nn.init.normal_(on_cpu(parameter), std=1e-6, generator=generator))
        elif parameter.ndim > 1:
            parameter.copy_(nn.init.trunc_normal_(on_cpu(parameter), std=0.02, generator=generator))


def on_cpu(x: Tensor) -> Tensor:
    """A tensor like `x` on the CPU, to be filled; of its strides, which decide what is drawn."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
