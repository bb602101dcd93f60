"""The student: a timm ViT whose blocks feed a ladder of projectors, one per teacher and token kind.

After every chosen block the raw residual stream goes through `Linear -> GELU -> Linear` per teacher
and token kind; the rungs' projections are summed (arXiv 2408.05088, section 3). Only the encoder is
exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from unic_ds import chance, config, override
from unic_ds.tokens import Normalise, Tokens, split_prefix

KINDS = ("cls", "patch")
NO_REGISTERS = (
    "student.registers {} cannot be had of {!r}; leave it -1, or choose a plain vit_ model"
)


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


class Head(NamedTuple):
    """What the ladder learns of one teacher."""

    width: int
    kinds: tuple[str, ...] = KINDS
    rungs: str = ""  # empty: the ladder's


class Projector(nn.Module):
    """`[LayerNorm ->] Linear(D, H) -> [LayerNorm ->] GELU -> Linear(H, C)`; `[LN ->] Linear(D, C)`
    where there is no hidden width.
    """

    def __init__(self, width: int, hidden: int, out: int, *, prenorm: bool, midnorm: bool):
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(width)] if prenorm else []
        if hidden:
            layers += [nn.Linear(width, hidden)] + ([nn.LayerNorm(hidden)] if midnorm else [])
            layers += [nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or width, out))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.layers(x_ND)


class BlockProjector(nn.Module):
    """One transformer block over [CLS; patches] and a Linear to the teacher's width.

    Sariyildiz et al., DUNE, arXiv 2503.14405.
    """

    def __init__(self, width: int, attention_heads: int, out: int, *, prenorm: bool):
        super().__init__()
        self.block = Block(width, attention_heads, qkv_bias=True)
        self.norm = nn.LayerNorm(width) if prenorm else nn.Identity()
        self.linear = nn.Linear(width, out)

    def forward(self, tokens: Tokens) -> Tokens:
        x_BND = torch.cat([tokens.cls_BC[:, None], tokens.patch_BNC], 1)
        y_BNC = self.linear(self.norm(self.block(x_BND)))
        return Tokens(y_BNC[:, 0], y_BNC[:, 1:])


class Ladder(nn.Module):
    """Projectors `heads.{teacher}.{cls|patch}.{block}`, the published names.

    A `transformer` projector sees both kinds of token: `heads.{teacher}.tokens.{block}`.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: Mapping[str, Head],
        cfg: config.Ladder,
        *,
        attention_heads: int = 1,
    ):
        """`heads` is keyed by teacher; `width`, `depth`, `attention_heads` are the encoder's."""
        super().__init__()
        if taken := [name for name in heads if hasattr(nn.ModuleDict(), name)]:
            raise ValueError(f"a teacher may not be named {taken[0]!r}, a word of torch's own")
        self.cfg = cfg
        rungs = {name: rung_blocks(head.rungs or cfg.rungs, depth) for name, head in heads.items()}
        # Without teachers (to evaluate the encoder alone) the rungs are those of the settings.
        blocks = set().union(*rungs.values()) if rungs else rung_blocks(cfg.rungs, depth)
        self.blocks = require_last(sorted(blocks), depth)
        hidden = cfg.width or width
        last = cfg.last_width or 4 * hidden

        def projector(block: int, out: int) -> nn.Module:
            if cfg.projector == "transformer":
                return BlockProjector(width, attention_heads, out, prenorm=cfg.prenorm)
            size = last if block == depth - 1 else hidden
            size = 0 if cfg.projector == "linear" else size
            return Projector(width, size, out, prenorm=cfg.prenorm, midnorm=cfg.midnorm)

        def column(name: str) -> nn.ModuleDict:
            made = {str(block): projector(block, heads[name].width) for block in rungs[name]}
            return nn.ModuleDict(made)

        joint = cfg.projector == "transformer"
        self.heads: Any = nn.ModuleDict(
            {
                name: nn.ModuleDict(
                    {kind: column(name) for kind in (("tokens",) if joint else head.kinds)}
                )
                for name, head in heads.items()
            }
        )

    def forward(self, states: list[Tokens]) -> dict[str, Tokens]:
        """Tokens of each rung -> fp32 prediction per teacher; `each` adds a leading axis L.

        A kind of token that is not learned comes out empty.
        """
        at = dict(zip(map(str, self.blocks), states, strict=True))
        return {name: self.climb(columns, at) for name, columns in self.heads.items()}

    def climb(self, columns: Any, at: Mapping[str, Tokens]) -> Tokens:
        """One teacher's projections, over its rungs: fp32 sum or stack."""
        if "tokens" in columns:
            rungs = [rung(at[block]) for block, rung in columns["tokens"].items()]
            return Tokens(*(self.combine(list(kind)) for kind in zip(*rungs, strict=True)))
        found = []
        for i, kind in enumerate(KINDS):
            column = columns[kind].items() if kind in columns else ()
            rungs = [rung(at[block][i]) for block, rung in column]
            found.append(self.combine(rungs) if rungs else at[str(self.blocks[-1])][i].new_empty(0))
        return Tokens(*found)

    def combine(self, projections: list[Tensor]) -> Tensor:
        """The rungs' projections of one kind of token, summed or apart, in fp32."""
        if self.cfg.combine == "each":
            return torch.stack([y.float() for y in projections])
        total = projections[0].float()
        for y in projections[1:]:
            total = total + y
        return total


def rung_blocks(rungs: str, depth: int) -> list[int]:
    """0-based blocks that `all`, `half`, `middle`, `last` or a list names; ValueError if absent."""
    named = {
        "all": range(depth),
        "half": range(depth - 1, -1, -2),
        "middle": [(depth - 1) // 2],
        "last": [depth - 1],
    }
    blocks = sorted(set(named[rungs] if rungs in named else map(int, rungs.split(","))))
    if blocks[-1] >= depth:
        raise ValueError(
            f"ladder.rungs names block {blocks[-1]}; the student's last is {depth - 1}"
        )
    return blocks


def require_last(blocks: list[int], depth: int) -> list[int]:
    """The blocks; ValueError unless the student's last is among them."""
    if blocks[-1] != depth - 1:  # what lies above the last rung would learn nothing
        raise ValueError(
            f"ladder.rungs ends with block {blocks[-1]}; it must end with the student's last,"
            f" {depth - 1}"
        )
    return blocks


class Student(nn.Module):
    """Encoder and ladder: uint8 images in, a prediction per teacher out."""

    def __init__(
        self, cfg: config.Student, ladder: config.Ladder, heads: Mapping[str, Head], *, seed: int
    ):
        """`heads` is keyed by teacher; weights are a function of (seed, name)."""
        super().__init__()
        self.encoder = build_encoder(cfg)
        self.normalise = Normalise(cfg.mean, cfg.std)
        self.ladder = Ladder(
            self.encoder.embed_dim,
            len(self.encoder.blocks),
            heads,
            ladder,
            attention_heads=self.encoder.blocks[0].attn.num_heads,
        )
        self.paths = give_drop_paths(self.encoder)
        initialise(self, seed)
        freeze_after_blocks(self.encoder)

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
def initialise(module: nn.Module, seed: int) -> None:
    """Give every parameter the initial value that its (seed, name) says, on any rank and stage.

    Weights and position embeddings: normal of std 0.02, cut at -2 and 2 as timm does; CLS and
    register tokens: std 1e-6; biases 0; norms and layer scales stay at the constants they were
    built with.
    """
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(chance.number(seed, name))
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith(("cls_token", "reg_token")):
            nn.init.normal_(parameter, std=1e-6, generator=generator)
        elif parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
