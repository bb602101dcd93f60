"""`unic-ds teachers start`: a student that begins with a teacher's features."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from pictures import folder
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer, load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from unic_ds import cli, demo
from unic_ds.config import Config, Data, Student
from unic_ds.evaluate.extraction import extract
from unic_ds.harness.students import StudentParts, model_of
from unic_ds.training.teacher_comparison import sample

DINO = "vit_small_patch14_dinov2"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder(tmp_path / "images", 40)
    return tmp_path / "images"


def loaded(file: Path, arch: str, size: int) -> VisionTransformer:
    model = timm.create_model(arch, img_size=size, num_classes=0).eval()
    load_checkpoint(model, str(file), filter_fn=checkpoint_filter_fn)
    assert isinstance(model, VisionTransformer)
    return model


@torch.no_grad()
def correlation(a: VisionTransformer, b: VisionTransformer, after: int, size: int) -> Tensor:
    """Of each channel: the CLS token of `a`, and the normed one after a block of `b`."""
    image_B3HW = torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(0))
    a_BC = a.forward_features(image_B3HW)[:, 0]
    inner = b.forward_intermediates(
        image_B3HW, indices=[after], return_prefix_tokens=True, intermediates_only=True
    )
    b_BC = torch.nn.functional.layer_norm(inner[0][1][:, 0], (a_BC.shape[1],), eps=1e-6)
    a_BC, b_BC = (x / x.norm(dim=0) for x in (a_BC - a_BC.mean(0), b_BC - b_BC.mean(0)))
    return (a_BC * b_BC).sum(0)


@pytest.mark.usefixtures("demonstration")
def test_the_start_has_the_features_after_the_teachers_block_standardised(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, weights = tmp_path / "start.safetensors", demo.root() / demo.PARTS[2]
    words = ["teachers", "start", "dinov2", "--data.train", str(images), "--out", str(out)]
    assert cli.dispatch([*words, "--student.size", "56"]) == 0
    printed = capsys.readouterr().out
    assert "standardised over 40 images" in printed
    assert f"--student.model {DINO} --student.size 56 --student.init" in printed
    student, teacher = (loaded(file, DINO, 56) for file in (out, weights))
    assert correlation(student, teacher, 10, 56).min() > 0.999
    cfg = Config(data=Data(train=str(images)), student=Student(model=DINO, size=56))
    model = model_of("start", StudentParts(cfg=cfg.student, encoder=student))
    std_C, mean_C = torch.std_mean(extract([model], sample(cfg, 40)).cls["start"], 0)
    assert mean_C.abs().max() < 1e-3 and (std_C - 1).abs().median() < 1e-3 and std_C.max() < 1.01
    with pytest.raises(ValueError, match="exists; choose another name"):
        cli.dispatch(words)


def test_a_teacher_without_layer_scale_and_the_channels_of_its_cls_token(
    images: Path, tmp_path: Path
) -> None:
    arch, out = "vit_tiny_patch16_224", tmp_path / "start.safetensors"
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model(arch, num_classes=0, img_size=32).state_dict(), weights)
    row = ["--teachers", f"own=file:{weights}#arch={arch}", "--teachers.own.block", "middle"]
    words = ["teachers", "start", "own", *row, "--data.train", str(images), "--student.size", "32"]
    assert cli.dispatch([*words, "--data.augment", "none", "--out", str(out)]) == 0
    student, teacher = (loaded(file, arch, 32) for file in (out, weights))
    assert correlation(student, teacher, 5, 32).min() > 0.999
    first, known = load_file(out), load_file(weights)
    kept = [name for name in first if "blocks.5." in name]
    assert all(torch.equal(first[name], known[name]) for name in kept)


@pytest.mark.usefixtures("demonstration")
@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["effnet"], "no tf_efficientnet_lite0 can start from teacher 'effnet'"),
        (["dinov2", "--student.model", "vit_tiny_patch16_224"], "does not fit vit_tiny_patch16"),
        (["dino"], "did you mean dinov2"),
        (["dinov2", "--out", "weights.bin"], "must be a new .safetensors file"),
        (["dinov2", "--images", "1"], "--images must be"),
    ],
)
def test_refusals_are_one_sentence_and_write_nothing(
    words: list[str], error: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=error):
        cli.dispatch(["teachers", "start", *words, "--data.train", str(images)])
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
