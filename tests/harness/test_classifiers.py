"""Classifiers of timm models on the tokens of their adapters, and those that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from unic_ds import config
from unic_ds.harness import classifiers
from unic_ds.teachers.teacher import load
from unic_ds.tokens import Normalise

CPU = torch.device("cpu")


def random_model(name: str, num_classes: int = 7) -> nn.Module:
    """A timm model with random weights; affine parts too, so that a forgotten norm shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=num_classes).eval()
        for value in model.parameters():
            nn.init.normal_(value, 0.0 if value.ndim > 1 else 1.0, 0.1)
    return model


def row_of(folder: Path, model: nn.Module, arch: str, **keys: object) -> config.Teacher:
    """A row that loads a model's weights from a file."""
    file = folder / f"{arch}.safetensors"
    save_file({key: x.contiguous() for key, x in model.state_dict().items()}, file)
    source = f"file:{file}#arch={arch}"
    return config.Teacher(**{"name": "t", "source": source, "precision": "fp32"} | keys)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("test_vit", "cls"),  # CLS token
        ("test_vit2", "cls"),  # a register, mean of the patches, LayerNorm
        ("test_vit3", "cls"),  # attention pool
        ("test_vit4", "cls"),  # a register, mean of the patches, RMS norm
        ("deit3_small_patch16_224", "cls"),
        ("eva02_tiny_patch14_224", "patch"),  # mean of the patches beside a CLS token, fc_norm
        ("test_convnext", "cls"),
        ("test_resnet", "cls"),
        ("test_efficientnet", "cls"),
        ("test_mambaout", "cls"),  # channels last
    ],
)
def test_logits_of_tokens_are_the_models(name: str, kinds: str, tmp_path: Path) -> None:
    model = random_model(name)
    row = row_of(tmp_path, model, name)
    teacher = load(row, grid=4, device=CPU)
    found = classifiers.read(row, grid=4, device=CPU)
    assert (found.classes, found.kinds) == (7, frozenset({kinds}))
    draws = torch.Generator().manual_seed(1)
    shape = (2, 3, teacher.size, teacher.size)
    image_B3HW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws)
    if hasattr(model, "set_input_size"):
        model.set_input_size(teacher.size)
    with torch.no_grad():
        truth_BL = model(Normalise(teacher.mean, teacher.std)(image_B3HW, torch.float32))
    scale = float(truth_BL.abs().max())
    tokens = teacher.on_own_grid(image_B3HW)
    other = tokens._replace(**{"patch_BNC" if kinds == "cls" else "cls_BC": torch.empty(0)})
    for shown in (tokens, other):  # a student may not predict the kind that is not read
        torch.testing.assert_close(found.logits(shown), truth_BL, rtol=1e-4, atol=1e-4 * scale)


REFUSED = {
    "no classifier among": ("test_vit", 0, {}),
    "tokens after block 1; its": ("test_vit", 7, {"block": "1"}),
    "reads more than its CLS and patch tokens": ("deit_tiny_distilled_patch16_224", 7, {}),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_has_no_classifier_of_its_tokens_is_refused(says: str, tmp_path: Path) -> None:
    name, classes, options = REFUSED[says]
    row = row_of(tmp_path, random_model(name, classes), name, **options)
    with pytest.raises(ValueError, match=f"^teacher 't' .*{says}"):
        classifiers.read(row, grid=4, device=CPU)


def test_teachers_without_a_classifier_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SigLIP has none, a module of the user's is not looked into."""
    good = row_of(tmp_path, random_model("test_vit"), "test_vit")
    python = replace(good, name="mine", source="python:small_teacher:narrow")
    bare = row_of(tmp_path, random_model("test_vit3", num_classes=0), "test_vit3", name="siglip")
    assert list(classifiers.read_all([good, python, bare], grid=4, device=CPU)) == ["t"]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("no classifier: teacher 'mine' has no classifier: only timm: and file:")
    assert second == "no classifier: teacher 'siglip' has no classifier among its weights"
