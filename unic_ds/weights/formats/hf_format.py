"""transformers' format: stock classes of ViT, DINOv2 and DINOv2 with registers.

Config and weights have the names of transformers 4, which later versions read too. Differences that
weights can express are expressed: positions of registers are added to them, a bias that is missing
is zero, layer scale that is missing is one, and ViT's pooler is the identity.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from timm.layers import GluMlp, LayerScale, Mlp, PatchEmbed
from timm.models import VisionTransformer
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from unic_ds.files import tensor_files, write_atomic
from unic_ds.models.encoder import attention_heads, has_cls, registers_of
from unic_ds.weights.formats.handover import Format, Handover

WEIGHTS, CONFIG, IMAGES = "model.safetensors", "config.json", "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number of the filter."""
CLASSES = {
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}

LOADING = """\
import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("THIS_FOLDER")
model, found = AutoModel.from_pretrained("THIS_FOLDER", output_loading_info=True)
assert not found["missing_keys"] and not found["unexpected_keys"]
model.eval()
prefix = 1 + getattr(model.config, "num_register_tokens", 0)
"""
RUNNING = """\
inputs = processor(list(images), return_tensors="pt")  # uint8 RGB [height, width, 3], or PIL
with torch.inference_mode():
    tokens = model(**inputs).last_hidden_state
outputs = {"cls": tokens[:, 0], "patch": tokens[:, prefix:]}
"""


def write(handover: Handover, folder: Path, _quantise: str) -> None:
    """Write config, weights and preprocessing; ValueError if no stock class has the shape."""
    encoder = handover.encoder
    if problem := misfit(encoder):
        raise ValueError(
            f"--to hf has no class for {handover.cfg.model}: {problem}; choose --to timm, onnx or"
            " export"
        )
    kind = kind_of(encoder)
    facts = settings(encoder, kind) | {"image_size": handover.cfg.size}
    write_atomic(folder / CONFIG, json.dumps(facts, indent=2) + "\n")
    state = {name: value.detach().clone() for name, value in weights(encoder, kind).items()}
    contiguous = {name: value.contiguous() for name, value in state.items()}
    tensor_files.save(contiguous, folder / WEIGHTS, {"format": "pt"})
    write_atomic(folder / IMAGES, json.dumps(images(handover), indent=2) + "\n")


def images(handover: Handover) -> dict[str, object]:
    """Settings of AutoImageProcessor: the whole image to a square."""
    cfg = handover.cfg
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": cfg.size, "width": cfg.size},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg.mean),
        "image_std": list(cfg.std),
    }


def kind_of(encoder: VisionTransformer) -> str:
    """The model type: ViT unless there are registers, layer scale or a gated MLP."""
    if registers_of(encoder):
        return "dinov2_with_registers"
    block = blocks_of(encoder)[0]
    plain = isinstance(block.ls1, nn.Identity) and isinstance(block.mlp, Mlp)
    return "vit" if plain else "dinov2"


def blocks_of(encoder: VisionTransformer) -> list[Block]:
    """The encoder's blocks, of timm's usual kind."""
    return cast(list[Block], list(encoder.blocks))


def hidden_of(encoder: VisionTransformer) -> int:
    """Width of the MLP, behind its gate if it has one."""
    return linear_of(blocks_of(encoder)[0].mlp, "fc2").in_features


def linear_of(module: nn.Module, name: str) -> nn.Linear:
    """A Linear within a module."""
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def misfit(encoder: VisionTransformer) -> str:
    """The property that no class has, as a clause; empty if there is none."""
    return next((clause for clause, wrong in properties(encoder) if wrong), "")


def properties(encoder: VisionTransformer) -> Iterator[tuple[str, bool]]:
    """(clause, True if it is so) for each property that no class has; later ones need earlier."""
    yield f"it is a {type(encoder).__name__}, no plain ViT", type(encoder) is not VisionTransformer
    yield "its patch embedding is no single convolution", not plain_patches(encoder.patch_embed)
    yield "it has no CLS token", not has_cls(encoder)
    yield "it has no learned position embeddings", encoder.pos_embed is None
    yield "it normalises before its blocks", not isinstance(encoder.norm_pre, nn.Identity)
    yield "it has no final LayerNorm", not isinstance(encoder.norm, nn.LayerNorm)
    kinds = {type(block).__name__ for block in encoder.blocks}
    yield f"its blocks are {', '.join(sorted(kinds))}", kinds != {Block.__name__}
    block = blocks_of(encoder)[0]
    norms = block.norm1, block.norm2, encoder.norm
    layer_norms = all(isinstance(norm, nn.LayerNorm) for norm in norms)
    yield "its norms are no LayerNorms", not layer_norms
    yield "its norms differ in epsilon", len({eps_of(norm) for norm in norms}) > 1
    yield from attention_properties(block.attn, encoder.embed_dim)
    yield from mlp_properties(encoder)


def plain_patches(embed: nn.Module) -> bool:
    """True if patches are embedded by one convolution."""
    return type(embed) is PatchEmbed and isinstance(embed.norm, nn.Identity)


def attention_properties(attention: nn.Module, width: int) -> Iterator[tuple[str, bool]]:
    """`properties` of the attention."""
    yield f"its attention is {type(attention).__name__}", type(attention) is not Attention
    for name, clause in (("q_norm", "normalises queries and keys"), ("norm", "has a norm inside")):
        part = getattr(attention, name, nn.Identity())
        yield f"its attention {clause}", not isinstance(part, nn.Identity)
    gated = any(name.startswith("gate") for name, _ in attention.named_parameters())
    yield "its attention has gates", gated
    other = linear_of(attention, "qkv").out_features != 3 * width
    yield "its attention is of another width than its tokens", other


def eps_of(norm: nn.Module) -> float:
    """Epsilon of a LayerNorm."""
    assert isinstance(norm, nn.LayerNorm)
    return norm.eps


def mlp_properties(encoder: VisionTransformer) -> Iterator[tuple[str, bool]]:
    """`properties` of MLP and layer scale."""
    mlp, width = blocks_of(encoder)[0].mlp, encoder.embed_dim
    yield f"its MLP is {type(mlp).__name__}", type(mlp) not in (Mlp, GluMlp)
    yield "its MLP has a norm inside", not isinstance(mlp.get_submodule("norm"), nn.Identity)
    act, hidden = mlp.get_submodule("act"), hidden_of(encoder)
    if isinstance(mlp, GluMlp):
        gated = mlp.gate_last or not isinstance(act, nn.SiLU)
        yield "its MLP is gated in another way than by SiLU of the first half", gated
        exact = 3 * hidden % (2 * width) == 0 and hidden % 8 == 0
    else:
        plain = getattr(act, "approximate", "none") == "none"
        yield "its activation is not the exact GELU", type(act).__name__ != "GELU" or not plain
        exact = hidden % width == 0
    yield (
        f"its MLP is {hidden} wide, which is no whole multiple of its {width} channels",
        kind_of(encoder) != "vit" and not exact,
    )
    scales = {type(part) for block in blocks_of(encoder) for part in (block.ls1, block.ls2)}
    yield "only some of its branches have layer scale", len(scales) > 1
    yield "its layer scale is of another kind", not scales <= {LayerScale, nn.Identity}


def settings(encoder: VisionTransformer, kind: str) -> dict[str, object]:
    """The class's config, without the image size."""
    block, width, hidden = blocks_of(encoder)[0], encoder.embed_dim, hidden_of(encoder)
    facts: dict[str, object] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_size": width,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": attention_heads(encoder),
        "patch_size": encoder.patch_embed.patch_size[0],
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": eps_of(encoder.norm),
        "qkv_bias": linear_of(block.attn, "qkv").bias is not None,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }
    if kind == "vit":
        return facts | {
            "intermediate_size": hidden,
            "pooler_output_size": width,
            "pooler_act": "linear",
        }
    gated = isinstance(block.mlp, GluMlp)
    facts |= {
        "mlp_ratio": 3 * hidden // (2 * width) if gated else hidden // width,
        "use_swiglu_ffn": gated,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
    }
    if kind == "dinov2_with_registers":
        facts["num_register_tokens"] = registers_of(encoder)
    return facts


def weights(encoder: VisionTransformer, kind: str) -> dict[str, Tensor]:
    """The weights by the class's names."""
    width = encoder.embed_dim
    found = embeddings(encoder)
    for i, block in enumerate(blocks_of(encoder)):
        at = f"encoder.layer.{i}"
        for name, value in block_weights(block, vit=kind == "vit").items():
            found[f"{at}.{name}"] = value
    found |= affine("layernorm", encoder.norm)
    if kind == "vit":
        found |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    else:
        found["embeddings.mask_token"] = torch.zeros(1, width)
    return found


def embeddings(encoder: VisionTransformer) -> dict[str, Tensor]:
    """Tokens and positions; those of registers are added to the registers."""
    cls_11D, pos_1ND = cast(Tensor, encoder.cls_token), cast(Tensor, encoder.pos_embed)
    count = registers_of(encoder)
    reg_1RD = encoder.reg_token if encoder.reg_token is not None else cls_11D[:, :0]
    if encoder.no_embed_class:
        pos_1ND = torch.cat([torch.zeros_like(cls_11D), pos_1ND], 1)
    elif count:
        reg_1RD = reg_1RD + pos_1ND[:, 1 : 1 + count]
        pos_1ND = torch.cat([pos_1ND[:, :1], pos_1ND[:, 1 + count :]], 1)
    found = {"embeddings.cls_token": cls_11D, "embeddings.position_embeddings": pos_1ND}
    if count:
        found["embeddings.register_tokens"] = reg_1RD
    return found | affine("embeddings.patch_embeddings.projection", encoder.patch_embed.proj)


def block_weights(block: Block, *, vit: bool) -> dict[str, Tensor]:
    """A block's weights by the class's names."""
    names = ("layernorm_before", "layernorm_after") if vit else ("norm1", "norm2")
    found = affine(names[0], block.norm1) | affine(names[1], block.norm2)
    qkv = linear_of(block.attn, "qkv")
    parts = {"weight": qkv.weight} | ({} if qkv.bias is None else {"bias": qkv.bias})
    for key, value in parts.items():
        for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
            found[f"attention.attention.{name}.{key}"] = part
    found |= affine("attention.output.dense", linear_of(block.attn, "proj"))
    first, second = ("intermediate.dense", "output.dense") if vit else ("mlp.fc1", "mlp.fc2")
    if isinstance(block.mlp, GluMlp):
        first, second = "mlp.weights_in", "mlp.weights_out"
    found |= affine(first, linear_of(block.mlp, "fc1"))
    found |= affine(second, linear_of(block.mlp, "fc2"))
    if not vit:
        for i, scale in enumerate((block.ls1, block.ls2), 1):
            own = scale.gamma if isinstance(scale, LayerScale) else torch.ones(qkv.in_features)
            found[f"layer_scale{i}.lambda1"] = own
    return found


def affine(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Weight and bias of a module; a bias that is missing is zero."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    bias = torch.zeros(len(weight)) if bias is None else bias
    assert isinstance(bias, Tensor)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


HF = Format(
    title="transformers",
    library="transformers",
    write=write,
    loading=LOADING,
    running=RUNNING,
    files=frozenset({WEIGHTS, CONFIG, IMAGES}),
    packages=("transformers",),
)
