"""Entry point of torch.hub: `torch.hub.load(REPO, "student", FOLDER, source="local")`."""

from __future__ import annotations

from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from torch import nn

import unic_ds.models.narrow_vit  # noqa: F401  (timm knows its architecture after this import)

dependencies = ["huggingface_hub", "safetensors", "timm", "torch"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def student(where: str) -> nn.Module:
    """The frozen student in a run folder, a model folder, or a hub repository, in evaluation mode.

    `where` is a folder or OWNER/NAME, also OWNER/NAME@REVISION. Its weights are read as
    safetensors, never unpickled. ValueError for a folder that holds no student.
    """
    folder = Path(where).expanduser()
    if not folder.is_dir():
        folder = downloaded(where)
    elif (folder / "student" / WEIGHTS).is_file():
        folder = folder / "student"
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(f"{str(folder)!r} holds no {missing[0]}; give a run's folder or student/")
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.requires_grad_(False).eval()


def downloaded(where: str) -> Path:
    """The folder in the hub's cache that a repository is downloaded to."""
    repository, _, revision = where.partition("@")
    if repository.count("/") != 1:
        raise ValueError(f"{where!r} is neither a folder nor OWNER/NAME on the Hugging Face hub")
    files = [
        Path(hf_hub_download(repository, name, revision=revision or None))
        for name in (CONFIG, WEIGHTS)
    ]
    return files[0].parent
