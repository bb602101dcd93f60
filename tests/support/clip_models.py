"""Small open_clip models, without weights of their own."""

from __future__ import annotations

import json

import open_clip

TEXT = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
VISION = {
    "zoo-vit": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "zoo-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32},
}


def clip_model(folder, name):
    """An open_clip model of ours by name."""
    (folder / f"{name}.json").write_text(
        json.dumps({"embed_dim": 16, "text_cfg": TEXT, "vision_cfg": VISION[name]})
    )
    open_clip.add_model_config(folder / f"{name}.json")
    return open_clip.create_model(name)
