"""open_clip's format: the student as image tower beside a teacher's text tower, for zero-shot.

No stock tower of open_clip has projectors on several blocks, so the folder has a short module of
its own, which timm knows after the user has imported it. What follows the ladder's GELU is affine,
and becomes one Linear: second Linears, their sum, the standardisation that is undone, and the
teacher's projection to the space of texts.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from unic_ds.files import apply_umask, tensor_files, write_atomic
from unic_ds.models.encoder import arguments, is_narrow
from unic_ds.weights.formats import student_tower
from unic_ds.weights.formats.handover import Format, Handover, Outputs, Predictions, TextSide

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
CODE, FACTS = "student_tower.py", "student_tower.json"
TEXTS = ("a photo of a cat", "a photo of a dog", "a diagram")
"""The texts of the program."""

LOADING = """\
import sys

import open_clip
import torch
from PIL import Image

sys.path.insert(0, "THIS_FOLDER")
import student_tower  # the folder's own code: it registers the image tower with timm

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:THIS_FOLDER")
texts = ["a photo of a cat", "a photo of a dog", "a diagram"]
model.eval()
"""
RUNNING = """\
pixels = torch.stack([preprocess(Image.fromarray(image)) for image in images])  # uint8 RGB
with torch.inference_mode():
    image = model.encode_image(pixels, normalize=True)
    text = model.encode_text(tokenizer(texts), normalize=True)
    probabilities = (model.logit_scale.exp() * image @ text.T).softmax(-1)
outputs = {"image": image, "text": text}
"""


def write(handover: Handover, folder: Path, _quantise: str) -> None:
    """Write config, weights, tokenizer and the module; ValueError if the ladder does not fit."""
    text, predictions = handover.text, handover.predictions
    assert text and predictions
    cfg = predictions.ladder.cfg
    if not cfg.one_op:
        raise ValueError(
            "--to openclip takes ladders whose projectors are Linear-GELU-Linear and are summed,"
            f" this one's are {cfg.projector} (combine {cfg.combine}, prenorm {cfg.prenorm},"
            f" midnorm {cfg.midnorm}); choose --to onnx --keep_projectors {text.teacher}"
        )
    if is_narrow(handover.cfg):
        raise ValueError(
            "--to openclip has no students with student.heads or student.mlp_width, since its code"
            f" builds timm's own models; choose --to onnx --keep_projectors {text.teacher}"
        )
    tower, hidden = tower_weights(predictions, text)
    state = {f"visual.trunk.{name}": value for name, value in tower.items()}
    for name, value in handover.encoder.state_dict().items():
        state[f"visual.trunk.encoder.{name}"] = value
    tensor_files.save({**state, **text.state}, folder / WEIGHTS, {"format": "pt"})
    facts = {
        "model": handover.cfg.model,
        "arguments": arguments(handover.cfg),
        "width": handover.encoder.embed_dim,
        "hidden": hidden,
        "embed_dim": len(tower["proj.bias"]),
    }
    write_atomic(folder / FACTS, json.dumps(facts, indent=2) + "\n")
    write_atomic(folder / CODE, Path(student_tower.__file__).read_text())
    write_atomic(folder / CONFIG, json.dumps(settings(handover, text), indent=2) + "\n")
    text.save_tokenizer(folder)
    for file in folder.iterdir():
        apply_umask(file)


def settings(handover: Handover, text: TextSide) -> dict[str, object]:
    """open_clip's config: that of the teacher with the student's image tower."""
    cfg = handover.cfg
    vision = {
        "timm_model_name": "unic_ds_student",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "none",
        "image_size": cfg.size,
    }
    preprocess = {
        "size": [cfg.size, cfg.size],
        "mean": list(cfg.mean),
        "std": list(cfg.std),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    return {"model_cfg": {**text.settings, "vision_cfg": vision}, "preprocess_cfg": preprocess}


@torch.no_grad()
def tower_weights(
    predictions: Predictions, text: TextSide
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(weights of rungs and projection by the tower's names, hidden width by block)."""
    published = predictions.ladder.export_state_dict()
    at = f"heads.{text.teacher}.cls."
    found = {name.removeprefix(at): v for name, v in published.items() if name.startswith(at)}
    blocks = sorted({int(name.split(".")[0]) for name in found})
    tower = {
        f"rungs.{block}.{key}": found[f"{block}.layers.0.{key}"]
        for block in blocks
        for key in ("weight", "bias")
    }
    second_CH = torch.cat([found[f"{block}.layers.2.weight"] for block in blocks], 1)
    bias_C = torch.stack([found[f"{block}.layers.2.bias"] for block in blocks]).sum(0)
    map_CE, offset_E = affine(predictions, text)
    tower["proj.weight"] = (second_CH.T @ map_CE).T
    tower["proj.bias"] = bias_C @ map_CE + offset_E
    hidden = {str(block): len(found[f"{block}.layers.0.bias"]) for block in blocks}
    return tower, hidden


@torch.no_grad()
def affine(predictions: Predictions, text: TextSide) -> tuple[Tensor, Tensor]:
    """The map from standardised summaries to embeddings: (matrix [C, E], offset [E]).

    ValueError if it is not affine.
    """
    scale, offset_2C = (
        predictions.get_buffer(f"{key}_{text.teacher}") for key in ("scale", "offset")
    )
    rows = [torch.zeros(1, offset_2C.shape[1]), torch.eye(offset_2C.shape[1])]
    rows.append(torch.randn(8, offset_2C.shape[1], generator=torch.Generator().manual_seed(0)))
    y_NC = torch.cat(rows)
    undone_NC = (y_NC @ scale[0] if scale.ndim == 3 else y_NC * scale[0]) + offset_2C[0]
    found_NE = text.project(undone_NC)
    offset_E, map_CE = found_NE[0], found_NE[1:-8] - found_NE[0]
    expected_NE = y_NC[-8:] @ map_CE + offset_E
    if not torch.allclose(found_NE[-8:], expected_NE, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"--to openclip: {text.teacher}'s projection to the space of texts is not affine;"
            " choose another teacher by --keep_projectors"
        )
    return map_CE, offset_E


def reference(handover: Handover, image_B3HW: Tensor) -> Outputs:
    """Outputs that open_clip must have: the predictions' embeddings, and those of the texts."""
    assert handover.text
    cls_BC = handover.outputs(image_B3HW)[f"{handover.text.teacher}_cls"]
    image_BE = F.normalize(handover.text.project(cls_BC), dim=-1)
    return {"image": image_BE, "text": handover.text.embed(TEXTS)}


OPENCLIP = Format(
    title="open_clip",
    library="open_clip",
    task="zero-shot-image-classification",
    write=write,
    loading=LOADING,
    running=RUNNING,
    reference=reference,
    files=frozenset(
        {WEIGHTS, CONFIG, CODE, FACTS, "tokenizer.json", "tokenizer_config.json"}
        | {"special_tokens_map.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model"}
        | {"tokenizer.model", "added_tokens.json"}
    ),
    packages=("open_clip",),
    predicts=True,
)
