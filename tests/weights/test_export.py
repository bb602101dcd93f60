"""The export against timm itself: what is written must load and give the encoder's features."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from unic_ds import config
from unic_ds.weights.export import export

CFG = config.Config(
    recipe="small",
    teachers=(
        config.Teacher(
            name="effnet", source="file:/secret/place/effnet.pth#arch=tf_efficientnet_lite0"
        ),
        config.Teacher(name="dinov2", source="timm:vit_small_patch14_dinov2"),
    ),
    student=config.Student(
        model="vit_tiny_patch16_224",
        size=64,
        drop_path=0.2,
        mean=(0.4, 0.5, 0.6),
        std=(0.3, 0.2, 0.25),
    ),
)
MANIFEST = {"effnet": {"licence": "Apache-2.0"}, "dinov2": {"licence": ""}}
MODEL = {"img_size": 64, "num_classes": 0}


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    """A ViT-Ti at 64 px with weights that no initialisation would give."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", **MODEL).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("norm."):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def photographs(size: int = 64) -> Tensor:
    """Two uint8 images with structure: a gradient and a disc."""
    y, x = np.mgrid[:size, :size]
    disc = 255 * ((x - size / 2) ** 2 + (y - size / 3) ** 2 < (size / 4) ** 2)
    planes = np.stack(
        [np.stack([x, y, x + y]) * 255 // (2 * size), np.stack([disc, 255 - disc, disc // 2])]
    )
    return torch.from_numpy(planes.astype(np.uint8))


@pytest.fixture(scope="module")
def out(encoder: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported folder."""
    folder = tmp_path_factory.mktemp("run") / "deeper" / "student"
    return export(encoder.state_dict(), CFG, photographs(), folder, teachers=MANIFEST)


def test_timm_loads_it_both_ways(encoder: torch.nn.Module, out: Path) -> None:
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert [p.name for p in out.parent.iterdir()] == ["student"]

    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    by_name = timm.create_model(
        "vit_tiny_patch16_224", checkpoint_path=str(out / "model.safetensors"), **MODEL
    ).eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CFG.student.mean, CFG.student.std))
    x = (photographs() / 255 - mean) / std
    with torch.no_grad():
        truth = encoder.forward_features(x)
        assert truth.std() > 0.1
        for loaded in (by_folder, by_name):
            assert (loaded.forward_features(x) - truth).abs().max() <= 1e-5
            assert loaded(x).shape == (2, 192)


def test_preprocessing_travels(out: Path) -> None:
    data = timm.data.resolve_data_config(
        model=timm.create_model(f"local-dir:{out}", pretrained=True)
    )
    assert data["input_size"] == (3, 64, 64)
    assert tuple(data["mean"]) == CFG.student.mean and tuple(data["std"]) == CFG.student.std
    assert data["interpolation"] == "bicubic" and data["crop_pct"] == 1.0
    settings = json.loads((out / "config.json").read_text())
    assert settings["architecture"] == "vit_tiny_patch16_224" and settings["num_classes"] == 0
    assert "augreg" not in json.dumps(settings)  # these are not the weights of timm's registry


def test_files_have_the_mode_of_the_umask(encoder: torch.nn.Module, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = export(
            encoder.state_dict(),
            CFG,
            photographs(),
            tmp_path / "student",
            extras={"ladder.safetensors": {"x": torch.ones(1)}},
        )
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}
    assert set(modes.values()) == {0o640} and len(modes) == 4


@pytest.mark.parametrize("out", ["", ".", "..", "a/.."])
def test_a_folder_without_a_name_is_refused(
    encoder: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    here = tmp_path / "x" / "here"  # which an export to `a/..` would remove
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match=r"names no new folder; give the export one"):
        export(encoder.state_dict(), CFG, photographs(), Path(out))
    assert list(tmp_path.rglob("*")) == [here.parent, here]


def test_nothing_is_left_when_the_proof_fails(encoder: torch.nn.Module, tmp_path: Path) -> None:
    state = dict(encoder.state_dict())
    state["blocks.3.mlp.fc1.weight"] = torch.full_like(
        state["blocks.3.mlp.fc1.weight"], float("nan")
    )
    with pytest.raises(RuntimeError, match="nothing was exported"):
        export(state, CFG, photographs(), tmp_path / "student")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_and_survives_a_failed_one(
    encoder: torch.nn.Module, tmp_path: Path
) -> None:
    out = export(encoder.state_dict(), CFG, photographs(), tmp_path / "student")
    changed = {k: v + 0.01 if k == "cls_token" else v for k, v in encoder.state_dict().items()}
    (tmp_path / ".student.partial").mkdir()  # of an export that was killed
    export(changed, CFG, photographs(), out)
    assert torch.equal(load_file(out / "model.safetensors")["cls_token"], changed["cls_token"])
    with pytest.raises(RuntimeError):
        export({k: v * float("nan") for k, v in changed.items()}, CFG, photographs(), out)
    assert torch.equal(load_file(out / "model.safetensors")["cls_token"], changed["cls_token"])
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_refusals(encoder: torch.nn.Module, tmp_path: Path) -> None:
    state, out = encoder.state_dict(), tmp_path / "student"
    with pytest.raises(ValueError, match="missing \\['cls_token'\\]"):
        export({k: v for k, v in state.items() if k != "cls_token"}, CFG, photographs(), out)
    with pytest.raises(ValueError, match=r"unknown \['ladder\.x'\]"):
        export(state | {"ladder.x": torch.ones(1)}, CFG, photographs(), out)
    with pytest.raises(ValueError, match=r"fp32 weights, but cls_token is torch\.bfloat16"):
        export(state | {"cls_token": state["cls_token"].bfloat16()}, CFG, photographs(), out)
    with pytest.raises(ValueError, match="3 x 64 x 64"):
        export(state, CFG, photographs(48), out)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        export(state, CFG, photographs().float(), out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no export"):
        export(state, CFG, photographs(), out)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_vit_of_registers_without_cls(tmp_path: Path) -> None:
    model, size = "vit_wee_patch16_reg1_gap_256", 64
    cfg = config.Config(student=config.Student(model=model, size=size, drop_path=0.1))
    torch.manual_seed(0)
    state = timm.create_model(model, img_size=size, num_classes=0).state_dict()
    out = export(state, cfg, photographs(size), tmp_path / "student")
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("model", "registers"), [("vit_tiny_patch16_224", 4), ("vit_wee_patch16_reg1_gap_256", 0)]
)
def test_registers_beside_the_model_s_own_travel(
    model: str, registers: int, tmp_path: Path
) -> None:
    student = config.Student(model=model, size=64, registers=registers)
    torch.manual_seed(0)
    state = timm.create_model(model, img_size=64, num_classes=0, reg_tokens=registers).state_dict()
    out = export(state, config.Config(student=student), photographs(), tmp_path / "student")
    assert json.loads((out / "config.json").read_text())["model_args"]["reg_tokens"] == registers
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert f"num_classes=0, reg_tokens={registers}\n" in (out / "README.md").read_text()
