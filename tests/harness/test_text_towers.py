"""Text towers of open_clip and timm teachers, loaded as published weights are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip import pretrained, tokenizer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config
from unic_ds.harness import text_towers
from unic_ds.teachers.teacher import load
from unic_ds.tokens import Normalise

CPU = torch.device("cpu")
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
TRUNK = {"image_size": 64, "timm_pool": "token", "timm_proj": "linear"}
COCA = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1, "dim_head": 16}
POOLED = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
VISION: dict[str, dict[str, Any]] = {
    "toy-vit": VIT,
    "toy-clipa": VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "toy-coca": VIT | POOLED,  # a pool narrower than the patches
    "toy-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32},
    "toy-trunk": TRUNK | {"timm_model_name": "test_vit"},
    "toy-map": TRUNK | {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
    "toy-pe": TRUNK | {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": None},
    "toy-convnext": TRUNK | {"timm_model_name": "test_convnext", "timm_pool": "avg"},
    "toy-mean": TRUNK | {"timm_model_name": "test_vit", "timm_pool": "avg"},
    "toy-rotary": TRUNK | {"timm_model_name": "test_convnext3", "timm_pool": "rot_attn"},
}
PE_CORE = "vit_pe_core_tiny_patch16_384"
VISION["toy-core"] = VISION["toy-pe"] | {"image_size": 384, "timm_model_name": PE_CORE}
OTHER = ("toy-mean", "toy-rotary", "toy-core")
WIDTH = {"toy-map": 96, "toy-core": 512}  # a tower without a projection has its own


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's home, below which open_clip keeps what it downloads."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    yield tmp_path
    for name in VISION:
        pretrained._PRETRAINED.pop(name, None)


def place(home: Path, name: str) -> tuple[torch.nn.Module, config.Teacher]:
    """A model with random weights, and the row that loads its file."""
    cfg = {"embed_dim": WIDTH.get(name, 16), "text_cfg": TEXT, "vision_cfg": VISION[name]}
    cfg |= {"multimodal_cfg": COCA} if name == "toy-coca" else {}
    cfg["text_cfg"] = TEXT | ({"embed_cls": True, "output_tokens": True} if "coca" in name else {})
    cfg |= {"custom_text": True} if name != "toy-vit" else {}
    (home / f"{name}.json").write_text(json.dumps(cfg))
    open_clip.add_model_config(home / f"{name}.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(name).eval()
        for value in model.visual.parameters():  # affine parts too: a forgotten norm shows
            torch.nn.init.normal_(value, 0.0 if value.ndim > 1 else 1.0, 0.1)
    save_file(model.state_dict(), home / ".cache" / "clip" / f"{name}.safetensors")
    if "timm_model_name" in VISION[name]:
        model.visual.set_input_size(VISION[name]["image_size"])
    pretrained._PRETRAINED[name] = {"toy": {"url": f"https://none/{name}.safetensors"}}
    source = f"open_clip:{name}/toy"
    return model, config.Teacher(name="clip", source=source, precision="fp32")


def images() -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=draws)


@pytest.mark.parametrize(
    "name", [name for name in VISION if name not in ("toy-mean", "toy-rotary", "toy-core")]
)
def test_embeddings_are_open_clips(name: str, home: Path) -> None:
    """Text through the tower, images through the teacher's summary and the projection."""
    model, row = place(home, name)
    tower = text_towers.read(row, grid=4, device=CPU)
    texts = ["A photo of a cat.", "two dogs"] * 150  # more than one forward
    tokens = open_clip.get_tokenizer(name)(texts)
    teacher = load(row, grid=4, device=CPU)
    normalise = Normalise(teacher.mean, teacher.std)
    with torch.no_grad():
        text_ME = model.encode_text(tokens, normalize=True)
        image_BE = model.encode_image(normalise(images(), torch.float32), normalize=True)
    torch.testing.assert_close(tower.embed(texts), text_ME, rtol=1e-5, atol=1e-5)
    found_BE = tower.project(teacher(images()).cls_BC)
    torch.testing.assert_close(F.normalize(found_BE, dim=-1), image_BE, rtol=1e-4, atol=1e-4)


def test_what_has_no_text_space_is_refused(home: Path, capsys: Any) -> None:
    """One sentence each; `read_all` prints them and goes on."""
    _, row = place(home, "toy-vit")
    mean, rotary = place(home, "toy-mean")[1], place(home, "toy-rotary")[1]
    says = {
        replace(row, block="1"): "those of --teachers.NAME.block output",
        replace(mean, name="mean"): "toy-mean compares with text what cannot be computed from",
        replace(rotary, name="rotary"): "toy-rotary compares with text what cannot be computed",
        replace(row, name="mine", source="python:small_teacher:narrow"): "is no open_clip: row",
        replace(row, name="lost", source="open_clip:ViT-H-14-quickgelu/metaclip_fullcc"): (
            "is not in the cache; run `unic-ds teachers fetch"
        ),
        replace(row, name="siglip2", source="open_clip:ViT-B-16-SigLIP2/webli"): (
            "has no text tower: "  # the tokenizer, or the package that reads it
        ),
        replace(row, name="dino", source="timm:vit_base_patch14_dinov2.lvd142m"): (
            "no open_clip model on this machine has the weights of timm:vit_base_patch14_dinov2"
        ),
        replace(row, name="siglip", source="timm:vit_base_patch16_siglip_224.v2_webli"): (
            "`unic-ds teachers fetch --teachers siglip=open_clip:ViT-B-16-SigLIP2/webli`"
        ),
    }
    for refused, sentence in says.items():
        with pytest.raises(ValueError, match=f"teacher '{refused.name}'") as error:
            text_towers.read(refused, grid=4, device=CPU)
        assert sentence in str(error.value)
    rows = [row, replace(mean, name="mean")]
    assert list(text_towers.read_all(rows, grid=4, device=CPU)) == ["clip"]
    assert capsys.readouterr().out.startswith("no text tower: teacher 'mean' has no text tower")


def test_a_timm_row_has_the_text_tower_of_the_same_weights(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One architecture has several weights: an image decides."""
    model, row = place(home, "toy-core")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached = home / "hub" / f"models--timm--{PE_CORE}.fb"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    file = cached / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    state = model.visual.trunk.state_dict()
    save_file(state, file, metadata={"format": "pt"})
    timm_row = replace(row, source=f"timm:{PE_CORE}.fb")
    found, whole = (text_towers.read(r, grid=4, device=CPU) for r in (timm_row, row))
    assert torch.equal(found.embed(["a cat"]), whole.embed(["a cat"]))
    cls_BC = torch.eye(model.visual.trunk.embed_dim)
    assert torch.equal(found.project(cls_BC), whole.project(cls_BC))
    save_file(state | {"norm.bias": state["norm.bias"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no open_clip model on this machine has the weights of"):
        text_towers.read(timm_row, grid=4, device=CPU)


def test_text_for_siglip_is_canonical() -> None:
    """SigLIP 2 loses 12 points by capital letters and punctuation: open_clip removes both."""
    clean = {
        name: open_clip.get_model_config(name)["text_cfg"]["tokenizer_kwargs"]["clean"]
        for name in open_clip.list_models()
        if "-SigLIP" in name
    }
    assert len(clean) > 20 and set(clean.values()) == {"canonicalize"}
    canonical = tokenizer.get_clean_fn("canonicalize")
    assert (
        canonical("A photo of the Self-made  Cat, (tabby)!") == "a photo of the selfmade cat tabby"
    )
