"""Programs of docs/downstream.md: each runs as a user would run it, and learns."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from composed_scenes import Size, scene
from composed_sets import LONG, save

from unic_ds import config, demo
from unic_ds.weights.export import export

PAGE = Path(__file__).resolve().parents[1] / "docs" / "downstream.md"
PROGRAMS = {
    re.match(r"# (\w+)\.py", code)[1]: code
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
}
SIDE = 96


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An exported encoder of random weights, large enough that images differ in its features."""
    settings = config.Student(model="test_vit", size=SIDE)
    torch.manual_seed(3)
    encoder = timm.create_model(settings.model, img_size=SIDE, num_classes=0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if not name.startswith("norm."):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    out = tmp_path_factory.mktemp("run") / "student"
    return export(encoder.state_dict(), config.Config(student=settings), images, out)


@pytest.fixture
def run(student, tmp_path):
    """Runs a program of the page on data and returns the per cent that it prints."""

    def percent(name, folder, epochs):
        file = tmp_path / f"{name}.py"
        file.write_text(PROGRAMS[name])
        done = subprocess.run(
            [sys.executable, file, student, folder, str(epochs)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return float(re.search(r"([\d.]+) % on", done.stdout)[1])

    return percent


def test_the_programs_import_no_unic_ds():
    assert set(PROGRAMS) == {"finetune", "segment"}
    for code in PROGRAMS.values():
        assert not re.search(r"^\s*(import|from) unic_", code, re.M)
        assert len([line for line in code.splitlines() if line.strip()]) <= 60


def test_finetuning_tells_mono_cells_from_poly_cells(demonstration, run, tmp_path):
    for kind in ("mono", "poly"):
        files = sorted((demo.root() / "images" / f"{kind}_ok").iterdir())
        for split, chosen in (("train", files[:64]), ("val", files[64:94])):
            (tmp_path / "cells" / split / kind).mkdir(parents=True)
            for file in chosen:
                shutil.copy(file, tmp_path / "cells" / split / kind)
    assert run("finetune", tmp_path / "cells", epochs=5) > 65  # chance is 50


def test_segmentation_head_finds_objects_on_grey(run, tmp_path):
    size, counts = Size(side=SIDE, train=40, val=12, noise=True), np.zeros(2)
    for split in ("train", "val"):
        for number in range(size.count(split)):
            found = scene(split, number, size)
            covered_HW = np.any([p.mask_HW for p in found.placed], 0) | found.edge_HW
            image_HW3 = np.where(covered_HW[..., None], found.image_HW3, np.uint8(128))
            mask_HW = np.where(found.edge_HW, 0, 1 + covered_HW).astype(np.uint8)
            save(image_HW3, tmp_path / "images" / LONG[split] / f"{number}.jpg")
            save(mask_HW, tmp_path / "annotations" / LONG[split] / f"{number}.png")
            if split == "val":
                counts += np.bincount(mask_HW.ravel(), minlength=3)[1:]
    majority = 100 * counts.max() / counts.sum() / 2
    assert 30 < majority < 50
    assert run("segment", tmp_path, epochs=10) > majority + 10
