"""timm's own format, proven as the others are; `weights.export` writes it."""

from __future__ import annotations

from unic_ds.weights.export import FILES
from unic_ds.weights.formats.handover import Format

LOADING = """\
import timm
import torch

model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()
config = timm.data.resolve_data_config(model=model)
mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
"""
RUNNING = """\
pixels = (torch.tensor(images) / 255 - mean) / std  # uint8 RGB [batch, height, width, 3]
with torch.inference_mode():
    tokens = model.forward_features(pixels.permute(0, 3, 1, 2))
patch = tokens[:, model.num_prefix_tokens :]
cls = tokens[:, 0] if getattr(model, "cls_token", None) is not None else patch.mean(1)
outputs = {"cls": cls, "patch": patch}
"""


TIMM = Format(
    title="timm",
    library="timm",
    loading=LOADING,
    running=RUNNING,
    files=frozenset(FILES),
)
