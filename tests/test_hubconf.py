"""torch.hub loads a student in one line, from folders and from a hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import serve
from runs import ROOT
from safetensors.torch import load_file
from timm.models import save_for_hf

LOAD = """
import sys
import timm
import torch

torch.manual_seed(0)
images = torch.rand(1, 3, 32, 32)
repo, *places = sys.argv[1:]
for place in places:
    if place.startswith("hf-hub:"):
        model = timm.create_model(place, pretrained=True).eval()
    else:
        model = torch.hub.load(repo, "student", place, source="local")
        assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    print(model.forward_features(images).double().sum().item())
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("deepspeed", "unic_ds")))
"""


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A tiny ViT."""
    torch.manual_seed(1)
    return timm.create_model("test_vit", img_size=32, num_classes=0).eval()


@pytest.fixture
def student(model: torch.nn.Module, tmp_path: Path) -> Path:
    """The student of a run; beside its weights lies a pickle, which is not to be read."""
    folder = tmp_path / "run" / "student"
    folder.mkdir(parents=True)
    save_for_hf(model, str(folder), safe_serialization=True)
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    return folder


def test_one_line_loads_a_student(student: Path, model: torch.nn.Module) -> None:
    image_B3HW = torch.rand(2, 3, 32, 32)
    for place in (student, student.parent):
        loaded = torch.hub.load(str(ROOT), "student", str(place), source="local")
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        with torch.no_grad():
            expected = model.forward_features(image_B3HW)
            assert (loaded.forward_features(image_B3HW) - expected).abs().max() <= 1e-5


@pytest.mark.slow
def test_from_the_hub_with_torch_and_timm_alone(
    student: Path, model: torch.nn.Module, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model.forward_features(torch.rand(1, 3, 32, 32)).double().sum().item()
    with serve() as hub:
        files = {path.name: path.read_bytes() for path in student.iterdir()}
        hub.branches["me/student"] = {"main": files, "v1": files}
        places = [student, "me/student", "me/student@v1", "hf-hub:me/student"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(ROOT), *map(str, places)],
            env=kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert not any(name.endswith(".bin") for name in hub.calls)
    assert done.returncode == 0, done.stderr
    *sums, modules = done.stdout.splitlines()
    assert [float(text) for text in sums] == pytest.approx([expected] * len(places), rel=1e-5)
    # The blocks of pruned students, which need no more than torch and timm.
    assert modules == "unic_ds unic_ds.models unic_ds.models.narrow_vit"


def test_what_holds_no_student_is_refused(student: Path, tmp_path: Path) -> None:
    assert load_file(student / "model.safetensors")
    (student / "model.safetensors").unlink()
    for place, message in (
        (student, r"holds no model\.safetensors"),
        (tmp_path, r"holds no config\.json"),
        ("nowhere", "neither a folder nor OWNER/NAME"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.hub.load(str(ROOT), "student", str(place), source="local")
