"""The student's encoder: a plain timm ViT, checked on the meta device before it is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias, TypeVar, cast

import timm
import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

from unic_ds import config
from unic_ds.config import overrides
from unic_ds.files.printable import printable
from unic_ds.models import narrow_vit
from unic_ds.models.meta import NoInit
from unic_ds.tokens import Tokens, split_prefix

T = TypeVar("T")
States: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""timm's tokens after a block: patches, or (patches, prefix)."""

NARROW = narrow_vit.narrow_vit.__name__
NO_REGISTERS = "student.registers {} does not fit {!r}; leave it -1, or choose a plain vit_ model"
NOT_PLAIN = "student.model {!r} is not a plain ViT; choose one of timm's vit_ models"


def architecture(cfg: config.Student) -> str:
    """timm's name of an encoder, in training and in an export's config."""
    return NARROW if is_narrow(cfg) else cfg.model


def is_narrow(cfg: config.Student) -> bool:
    """True if its blocks have fewer heads or a narrower MLP than the model's."""
    return bool(cfg.heads or cfg.mlp_width)


def arguments(cfg: config.Student) -> dict[str, Any]:
    """Arguments of timm.create_model for an encoder, in training and in an export's config."""
    registers = {"reg_tokens": cfg.registers} if cfg.registers >= 0 else {}
    shape = {"base": cfg.model, "heads": cfg.heads, "mlp_width": cfg.mlp_width}
    return {"img_size": cfg.size, "num_classes": 0} | registers | (shape if is_narrow(cfg) else {})


def attention_heads(encoder: VisionTransformer) -> int:
    """Heads of the first block's attention, before it was narrowed; StopIteration if it has none.

    They fill the encoder's width.
    """
    parts = (part for part in encoder.blocks[0].modules() if hasattr(part, "num_heads"))
    attn: Any = next(parts)
    narrowed = type(attn) is Attention  # narrow_vit has no other kind with fewer heads
    return encoder.embed_dim // attn.head_dim if narrowed else attn.num_heads


def build_encoder(cfg: config.Student, *, any_size: bool = False) -> VisionTransformer:
    """A timm ViT without a head at `cfg.size`.

    `any_size`: it takes images of other sides too, for which timm resamples its position embeddings
    in each forward (bicubic, antialiased); its weights are the same.

    ValueError for a name that timm does not have, for any model but a plain ViT, and for a size,
    registers, heads or a width of the MLP that the model does not take.
    """
    grid_of(cfg)
    return create(cfg, any_size=any_size)


def create(cfg: config.Student, *, any_size: bool = False) -> VisionTransformer:
    """The encoder as timm builds it; timm's own errors for arguments that it does not take."""
    options = arguments(cfg) | ({"dynamic_img_size": True} if any_size else {})
    encoder = timm.create_model(architecture(cfg), drop_path_rate=cfg.drop_path, **options)
    return cast(VisionTransformer, encoder)  # or a model with its interface: see assert_plain


@cache
def grid_of(cfg: config.Student) -> int:
    """Side of the patch grid, without building weights; ValueError as `build_encoder`."""
    return check_plain(cfg.model, cfg.size, cfg.registers, cfg.heads, cfg.mlp_width)


@cache
def check_plain(model: str, size: int, registers: int, heads: int, mlp_width: int) -> int:
    """Side of the patch grid of a plain ViT at `size` px; ValueError for any other model.

    The model runs once on the meta device, through the functions that train and export it: about
    0.2 s.
    """
    if model == NARROW or not timm.is_model(model):
        near = overrides.nearest(model, timm.list_models("*vit*", exclude_filters=NARROW))
        raise ValueError(f"student.model {model!r} is not a timm model{near}")
    cfg = config.Student(
        model=model, size=size, registers=registers, heads=heads, mlp_width=mlp_width
    )
    encoder = attempt(lambda: outline(lambda: create(cfg)))
    if isinstance(encoder, Exception):
        raise ValueError(refusal(cfg, encoder, encoder)) from encoder
    wrong = attempt(lambda: assert_plain(encoder, size))
    if wrong is not None or registers not in (-1, registers_of(encoder)):
        raise ValueError(refusal(cfg, encoder, wrong)) from wrong
    return encoder.patch_embed.grid_size[0]


def grids_of(cfg: config.Config) -> tuple[int, ...]:
    """Side of the patch grid at each of `data.sizes`, or at `student.size` alone; else ValueError.

    ValueError for a model that does not take them, and as `build_encoder`.
    """
    usual = grid_of(cfg.student)
    if not cfg.data.sizes:
        return (usual,)
    return tuple(grid_at(cfg.student, size) for size in cfg.data.sizes)


@cache
def grid_at(cfg: config.Student, size: int) -> int:
    """Side of the patch grid of images of another side than `cfg.size`, for the same weights.

    ValueError if the model does not take them. It runs once on the meta device.
    """
    patch = cfg.size // grid_of(cfg)
    if size % patch:
        raise ValueError(
            f"data.sizes has {size}, which is not a multiple of {cfg.model}'s patch size {patch}"
        )
    if wrong := attempt(lambda: assert_any_size(cfg, size)):
        raise ValueError(
            f"student.model {cfg.model!r} takes images of one side alone; leave data.sizes empty,"
            " or choose another of timm's vit_ models"
        ) from wrong
    return size // patch


def assert_any_size(cfg: config.Student, size: int) -> None:
    """An error unless the model of `cfg.size` takes images of `size` px with the same weights."""
    usual, encoder = outline(lambda: create(cfg)), outline(lambda: create(cfg, any_size=True))
    shapes, others = ({k: x.shape for k, x in of.state_dict().items()} for of in (usual, encoder))
    assert shapes == others
    assert_tokens(encoder, size, size // (cfg.size // grid_of(cfg)))


def refusal(
    cfg: config.Student, encoder: VisionTransformer | Exception, wrong: Exception | None
) -> str:
    """Message for a student that cannot be used, whose error was `wrong`."""
    usual = attempt(lambda: outline(lambda: default_encoder(cfg.model)))
    if isinstance(usual, Exception):  # an unknown tag
        return f"student.model {cfg.model!r}: {printable(usual)}"
    if attempt(lambda: assert_plain(usual, default_size(usual))) is not None:
        return NOT_PLAIN.format(cfg.model)
    narrowed = attempt(lambda: narrow_vit.narrow(usual, cfg.heads, cfg.mlp_width))
    if narrowed is not None:
        return f"student.{narrowed} ({cfg.model})"
    if cfg.size % (patch := usual.patch_embed.patch_size[0]):
        return f"student.size {cfg.size} is not a multiple of {cfg.model}'s patch size {patch}"
    found = -1 if isinstance(encoder, Exception) else registers_of(encoder)
    if cfg.registers >= 0 and found != cfg.registers:
        return NO_REGISTERS.format(cfg.registers, cfg.model)
    why = printable(wrong) or "its patch tokens do not form a square grid"
    return f"student.model {cfg.model!r} does not take {cfg.size} px: {why}"


def default_encoder(model: str) -> VisionTransformer:
    """A timm model in its own image size, without a head."""
    return cast(VisionTransformer, timm.create_model(model, num_classes=0))


def default_size(encoder: VisionTransformer) -> int:
    """Image side in pixels that timm has a model's weights for."""
    return vars(encoder)["pretrained_cfg"]["input_size"][-1]


def outline(make: Callable[[], T]) -> T:
    """Build a model by `make` on the meta device."""
    with torch.device("meta"), NoInit():
        return make()


def attempt(make: Callable[[], T]) -> T | Exception:
    """Call `make`; its result, or the exception that it raised."""
    try:
        return make()
    except Exception as error:
        return error


def registers_of(encoder: VisionTransformer) -> int:
    """Number of prefix tokens other than CLS."""
    return encoder.num_prefix_tokens - has_cls(encoder)


@torch.no_grad()
def assert_plain(encoder: VisionTransformer, size: int) -> None:
    """AssertionError, or an error of the model's own, unless it can be a student at `size` px.

    Its blocks give a square grid of patch tokens and a prefix, and its state has no buffers, which
    an export would lack.
    """
    (rows, columns), width = encoder.patch_embed.grid_size, encoder.embed_dim
    assert rows == columns and size % encoder.patch_embed.patch_size[0] == 0
    assert encoder.patch_embed.proj.weight.is_floating_point()  # its type is the student's
    assert width % attention_heads(encoder) == 0
    assert dict(encoder.named_parameters()).keys() == encoder.state_dict().keys()
    assert_tokens(encoder, size, rows)


@torch.no_grad()
def assert_tokens(encoder: VisionTransformer, size: int, grid: int) -> None:
    """AssertionError, or an error of the model's own, unless its blocks give tokens on the grid."""
    image_B3HW, blocks = torch.empty(2, 3, size, size, device="meta"), range(len(encoder.blocks))
    tokens = [*residuals(encoder, image_B3HW, blocks), features(encoder, image_B3HW)]
    assert len(tokens) == len(blocks) + 1
    for cls_BC, patch_BNC in tokens:
        assert cls_BC.shape == (2, encoder.embed_dim)
        assert patch_BNC.shape == (2, grid * grid, encoder.embed_dim)


def residuals(encoder: VisionTransformer, x_B3HW: Tensor, blocks: Sequence[int]) -> list[Tokens]:
    """Tokens of the residual stream after each of `blocks`, for normalised images.

    timm gives (patches, prefix tokens), or the patches alone if the model has no prefix. Without a
    CLS token the mean of the patches takes its place.
    """
    states = encoder.forward_intermediates(
        x_B3HW,
        indices=list(blocks),
        return_prefix_tokens=True,
        norm=False,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return block_tokens(encoder, cast(list[States], states))


def block_tokens(encoder: VisionTransformer, states: Sequence[States]) -> list[Tokens]:
    """Tokens of timm's intermediate states, as `residuals` returns them."""
    found = []
    for state in states:
        patch_BND, prefix_BRD = state if isinstance(state, tuple) else (state, None)
        if prefix_BRD is None or not has_cls(encoder):
            found.append(Tokens(patch_BND.mean(1), patch_BND))
        else:
            found.append(Tokens(prefix_BRD[:, 0], patch_BND))
    return found


def features_and_residuals(
    encoder: VisionTransformer, x_B3HW: Tensor, blocks: Sequence[int]
) -> tuple[Tokens, list[Tokens]]:
    """Both `features` and `residuals`, by one pass through the blocks."""
    x_BND, states = encoder.forward_intermediates(
        x_B3HW, indices=list(blocks), return_prefix_tokens=True, norm=False, output_fmt="NLC"
    )
    tokens = split_prefix(cast(Tensor, x_BND), encoder.num_prefix_tokens, has_cls=has_cls(encoder))
    return tokens, block_tokens(encoder, cast(list[States], states))


def features(encoder: VisionTransformer, x_B3HW: Tensor) -> Tokens:
    """Tokens after the encoder's final norm, for normalised images."""
    x_BND = encoder.forward_features(x_B3HW)
    return split_prefix(x_BND, encoder.num_prefix_tokens, has_cls=has_cls(encoder))


def freeze_after_blocks(encoder: nn.Module) -> None:
    """Freeze the modules after the last block: they get no gradient, but exports use the norm.

    It keeps its initial affine, so that export = LayerNorm without scale (method: section 2).
    """
    for name in ("norm", "fc_norm", "attn_pool"):
        if isinstance(module := getattr(encoder, name, None), nn.Module):
            module.requires_grad_(False)


def has_cls(encoder: VisionTransformer) -> bool:
    """True if the encoder's first token is a CLS token."""
    return getattr(encoder, "cls_token", None) is not None
