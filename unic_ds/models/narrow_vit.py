"""A timm ViT whose blocks have fewer attention heads or a narrower MLP.

timm divides the channels among the heads, so its own arguments have no fewer heads of the same
width. After this import timm knows the architecture as `narrow_vit`. It needs torch and timm alone:
an exported folder holds a copy.
"""

from typing import Any, cast

import timm
from timm.layers import Attention
from timm.models import VisionTransformer, load_pretrained, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

FIRST = ("fc1", "fc1_g", "fc1_x")
"""Linears before the activation of an MLP; timm's kinds have the first, or the other two."""


def narrow(encoder: VisionTransformer, heads: int, mlp_width: int) -> None:
    """Give every block new Linears, for fewer heads of the same width and fewer MLP channels.

    0 leaves heads, or the MLP, as they are. The new weights are torch's: load others. ValueError
    if a block has fewer than are asked for, or its attention or MLP is of another kind.
    """
    for block in encoder.blocks:
        if heads:
            narrow_attention(plain_attention(block), heads)
        if mlp_width:
            narrow_mlp(plain_mlp(block), mlp_width)


def plain_attention(block: nn.Module) -> Attention:
    """The attention of a block; ValueError for another than timm's, without a norm inside."""
    attn = getattr(block, "attn", block)
    if type(attn) is not Attention or not isinstance(attn.norm, nn.Identity):
        kind = f"{type(attn).__module__}.{type(attn).__name__}"
        raise ValueError(
            f"heads can be fewer in the attention of timm's plain ViTs alone, not in {kind}; choose"
            " such a model, or keep its heads"
        )
    return attn


def plain_mlp(block: nn.Module) -> Any:
    """The MLP of a block; ValueError for another than timm's, without a norm inside."""
    mlp = getattr(block, "mlp", block)
    if not any(hasattr(mlp, name) for name in FIRST) or not isinstance(mlp.norm, nn.Identity):
        kind = f"{type(mlp).__module__}.{type(mlp).__name__}"
        raise ValueError(
            f"mlp_width can be less in the MLP of timm's plain ViTs alone, not in {kind}; choose"
            " such a model, or keep its width"
        )
    return mlp


def narrow_attention(attn: Attention, heads: int) -> None:
    """Give an attention new Linears for `heads` heads."""
    if heads > attn.num_heads:
        raise ValueError(f"heads {heads} is too many, give at most {attn.num_heads}")
    attn.num_heads, attn.attn_dim = heads, heads * attn.head_dim
    attn.qkv = resized(attn.qkv, rows=3 * attn.attn_dim)
    if attn.gate is not None:
        attn.gate = resized(attn.gate, rows=attn.attn_dim)
    attn.proj = resized(attn.proj, columns=attn.attn_dim)


def narrow_mlp(mlp: Any, width: int) -> None:
    """Give an MLP new Linears for `width` hidden channels, behind its gate if it has one."""
    usual = mlp.fc2.in_features
    if width > usual:
        raise ValueError(f"mlp_width {width} is too wide, give at most {usual}")
    for name in FIRST:
        if linear := getattr(mlp, name, None):
            setattr(mlp, name, resized(linear, rows=linear.out_features // usual * width))
    mlp.fc2 = resized(mlp.fc2, columns=width)


def resized(linear: nn.Linear, *, rows: int = 0, columns: int = 0) -> nn.Linear:
    """A new Linear with other numbers of outputs (`rows`) or inputs (`columns`); 0: the same."""
    weight = linear.weight
    return nn.Linear(
        columns or linear.in_features,
        rows or linear.out_features,
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )


@register_model
def narrow_vit(
    pretrained: bool = False, base: str = "", heads: int = 0, mlp_width: int = 0, **kwargs: Any
) -> VisionTransformer:
    """Build timm's model `base` with narrower blocks; `pretrained_cfg` names the weights."""
    encoder = cast(VisionTransformer, timm.create_model(base, **kwargs))
    narrow(encoder, heads, mlp_width)
    facts = vars(encoder)["pretrained_cfg"]
    facts["architecture"] = "narrow_vit"
    if pretrained:
        load_pretrained(
            encoder,
            pretrained_cfg=facts,
            num_classes=encoder.num_classes,
            in_chans=kwargs.get("in_chans", 3),
            filter_fn=checkpoint_filter_fn,
            cache_dir=kwargs.get("cache_dir"),
        )
    return encoder
