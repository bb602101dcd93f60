"""The student: a timm ViT whose blocks feed a ladder of projectors; only the ViT is exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import timm
import torch
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unic_ds import config, rng
from unic_ds.blocks import compile_each
from unic_ds.config import overrides
from unic_ds.config.block_choice import ActivationCheckpointing
from unic_ds.files.printable import printable
from unic_ds.models.ladder import Head, Ladder
from unic_ds.models.meta import NoInit
from unic_ds.ops import FUSED, Ops
from unic_ds.tokens import Normalise, Tokens, split_prefix

NO_REGISTERS = (
    "student.registers {} cannot be had of {!r}; leave it -1, or choose a plain vit_ model"
)
NOT_PLAIN = "student.model {!r} is not a plain ViT; choose one of timm's vit_ models"


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
        self.recomputed = recompute(self.encoder.blocks, cfg.activation_checkpointing)

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
        image_B3HW = self.normalise(image_B3HW, self.dtype)
        return self.ladder(residuals(self.encoder, image_B3HW, self.ladder.blocks))

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tokens:
        """Exported features: tokens after the final norm."""
        return features(self.encoder, self.normalise(image_B3HW, self.dtype))


def residuals(encoder: Any, x_B3HW: Tensor, blocks: Sequence[int]) -> list[Tokens]:
    """Tokens of the residual stream after each of `blocks`, for normalised images.

    timm gives (patches, prefix tokens), or the patches alone where the model has no prefix. The
    mean of the patches stands for a CLS token that is not there.
    """
    states = encoder.forward_intermediates(
        x_B3HW,
        indices=blocks,
        return_prefix_tokens=True,
        norm=False,
        output_fmt="NLC",
        intermediates_only=True,
    )
    found = []
    for state in states:
        patch_BND, prefix_BRD = state if isinstance(state, tuple) else (state, None)
        no_cls = prefix_BRD is None or not has_cls(encoder)
        found.append(Tokens(patch_BND.mean(1) if no_cls else prefix_BRD[:, 0], patch_BND))
    return found


def features(encoder: Any, x_B3HW: Tensor) -> Tokens:
    """Tokens after the encoder's final norm, for normalised images."""
    x_BND = encoder.forward_features(x_B3HW)
    return split_prefix(x_BND, encoder.num_prefix_tokens, has_cls=has_cls(encoder))


def ladder_on(
    encoder: Any, cfg: config.Ladder, heads: Mapping[str, Head], ops: Ops = FUSED
) -> Ladder:
    """The ladder that stands on an encoder's blocks."""
    return Ladder(
        encoder.embed_dim,
        len(encoder.blocks),
        heads,
        cfg,
        attention_heads=attention_heads(encoder),
        ops=ops,
    )


def arguments(cfg: config.Student) -> dict[str, Any]:
    """What timm is told beside the model's name, whoever builds the encoder."""
    registers = {"reg_tokens": cfg.registers} if cfg.registers >= 0 else {}
    return {"img_size": cfg.size, "num_classes": 0} | registers


def attention_heads(encoder: Any) -> int:
    """Heads of the first block's attention; StopIteration where it has none."""
    return next(
        part.num_heads for part in encoder.blocks[0].modules() if hasattr(part, "num_heads")
    )


def build_encoder(cfg: config.Student) -> Any:
    """A timm ViT without a head at `cfg.size`.

    ValueError for what timm does not have, for what is not a plain ViT, and for a size or registers
    that the model does not take.
    """
    check_plain(cfg.model, cfg.size, cfg.registers)
    return create(cfg)


def create(cfg: config.Student) -> Any:
    """The encoder as timm builds it; any error of timm's for arguments that it does not take."""
    return timm.create_model(cfg.model, drop_path_rate=cfg.drop_path, **arguments(cfg))


@cache
def grid_of(cfg: config.Student) -> int:
    """Side of the patch grid, without building weights; ValueError as `build_encoder`."""
    return check_plain(cfg.model, cfg.size, cfg.registers)


@cache
def check_plain(model: str, size: int, registers: int) -> int:
    """Side of the patch grid of a plain ViT at `size` px; ValueError for any other model.

    The model runs once on the meta device, through the functions that train and export it: about
    0.2 s.
    """
    if not timm.is_model(model):
        near = overrides.nearest(model, timm.list_models("*vit*"))
        raise ValueError(f"student.model {model!r} is not a timm model{near}")
    cfg = config.Student(model=model, size=size, registers=registers)
    encoder = attempt(lambda: outline(lambda: create(cfg)))
    wrong = attempt(lambda: assert_plain(encoder, size))
    if wrong is not None or registers not in (-1, registers_of(encoder)):
        wrong = encoder if isinstance(encoder, Exception) else wrong
        raise ValueError(refusal(cfg, encoder, wrong)) from wrong
    return encoder.patch_embed.grid_size[0]


def refusal(cfg: config.Student, encoder: Any, wrong: Exception | None) -> str:
    """The sentence that refuses a student; `wrong` is what building or running it raised."""
    usual = attempt(lambda: outline(lambda: timm.create_model(cfg.model, num_classes=0)))
    if isinstance(usual, Exception):  # an unknown tag
        return f"student.model {cfg.model!r}: {printable(usual)}"
    if attempt(lambda: assert_plain(usual, usual.pretrained_cfg["input_size"][-1])) is not None:
        return NOT_PLAIN.format(cfg.model)
    if cfg.size % (patch := usual.patch_embed.patch_size[0]):
        return f"student.size {cfg.size} is not a multiple of {cfg.model}'s patch size {patch}"
    if cfg.registers >= 0 and (wrong is encoder or registers_of(encoder) != cfg.registers):
        return NO_REGISTERS.format(cfg.registers, cfg.model)
    why = printable(wrong) or "its patch tokens are no square grid"
    return f"student.model {cfg.model!r} does not take {cfg.size} px: {why}"


def outline(make: Callable[[], Any]) -> Any:
    """Build a model by `make` on the meta device."""
    with torch.device("meta"), NoInit():
        return make()


def attempt(make: Callable[[], Any]) -> Any:
    """Call `make`; its result, or the exception that it raised."""
    try:
        return make()
    except Exception as error:
        return error


def registers_of(encoder: Any) -> int:
    """Prefix tokens beside CLS."""
    return encoder.num_prefix_tokens - has_cls(encoder)


@torch.no_grad()
def assert_plain(encoder: Any, size: int) -> None:
    """AssertionError, or an error of the model's own, unless it can be a student at `size` px.

    Its blocks give a square grid of patch tokens and a prefix, and its state is parameters alone,
    which are what an export has.
    """
    image_B3HW, blocks = torch.empty(2, 3, size, size, device="meta"), range(len(encoder.blocks))
    (rows, columns), width = encoder.patch_embed.grid_size, encoder.embed_dim
    assert rows == columns and size % encoder.patch_embed.patch_size[0] == 0
    assert encoder.patch_embed.proj.weight.is_floating_point()  # its type is the student's
    assert width % attention_heads(encoder) == 0
    assert dict(encoder.named_parameters()).keys() == encoder.state_dict().keys()
    tokens = [*residuals(encoder, image_B3HW, blocks), features(encoder, image_B3HW)]
    assert len(tokens) == len(blocks) + 1
    for cls_BC, patch_BNC in tokens:
        assert cls_BC.shape == (2, width)
        assert patch_BNC.shape == (2, rows * columns, width)


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
    chosen = [blocks[i] for i in ActivationCheckpointing.parse(which).blocks(len(blocks))]
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

    Weights and position embeddings: normal of std 0.02, of which timm's cut at -2 and 2 takes
    nothing; CLS and register tokens: std 1e-6; biases 0; norms and layer scales stay at the
    constants they were built with. All are drawn on the CPU and in fp32: under ZeRO-3 a weight is
    in bf16 on its GPU, whose generator would draw others. torch's trunc_normal_ is not used, since
    before 2.14 it draws others, and in bf16 weights of -2 and 2.
    """
    for name, parameter in weights.items():
        if parameter.is_meta:
            continue
        generator = torch.Generator().manual_seed(rng.seed_for(seed, name))
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim > 1:
            std = 1e-6 if name.endswith(("cls_token", "reg_token")) else 0.02
            parameter.copy_(nn.init.normal_(on_cpu(parameter), std=std, generator=generator))


def on_cpu(x: Tensor) -> Tensor:
    """An empty fp32 tensor like `x` on the CPU; of its strides, which decide what is drawn."""
    return torch.empty_strided(x.shape, x.stride(), dtype=torch.float32, device="cpu")
