"""Weight files: the same bytes and mode each time, one identity for the same tensors, no bombs."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from runs import LOST, alone, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unic_ds import cli, config
from unic_ds.files import tensor_files
from unic_ds.process import entry_point
from unic_ds.teachers import sources, weight_files
from unic_ds.training import checkpoint

ARCH = "test_vit"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of a small ViT."""
    torch.manual_seed(0)
    return timm.create_model(ARCH).state_dict()


def row(path: Path) -> config.Teacher:
    return config.Teacher(name="t", source=f"file:{path}#arch={ARCH}", precision="fp32")


def test_the_same_weights_are_the_same_bytes_with_the_umask_s_mode(tmp_path: Path) -> None:
    state = {"b": torch.ones(2, 3).T, "a": torch.zeros(())}
    before = os.umask(0o027)
    try:
        for i in range(8):
            file = tmp_path / f"{i}.safetensors"
            tensor_files.save(state, file, {"licence": "MIT é\n", "origin": "a package"})
    finally:
        os.umask(before)
    files = sorted(tmp_path.iterdir())
    assert len({file.read_bytes() for file in files}) == 1
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o640}
    with safe_open(files[0], "pt") as file:
        assert list(file.metadata()) and file.metadata()["licence"] == "MIT é\n"
        assert torch.equal(file.get_tensor("b"), state["b"])


def test_weights_are_known_by_names_types_shapes_and_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = {"head.weight": torch.randn(4, 6), "cls_token": torch.randn(1, 6).bfloat16()}
    save_file(x, tmp_path / "a.safetensors", {"format": "pt", "licence": "MIT"})
    save_file(x, tmp_path / "b.safetensors", {"format": "pt", "licence": "BSD"})
    torch.save({"state_dict": {f"module.{k}": v for k, v in x.items()}}, tmp_path / "c.pth")
    torch.save(x, tmp_path / "d.pth", _use_new_zipfile_serialization=False)
    found = [weight_files.hashes(file) for file in sorted(tmp_path.iterdir())]
    for file, hashed in zip(sorted(tmp_path.iterdir()), found, strict=True):
        assert hashed["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert len({hashed["content"] for hashed in found}) == 1
    assert len({hashed["sha256"] for hashed in found}) == 4
    others = (
        x | {"head.weight": x["head.weight"].view(6, 4)},
        x | {"head.weight": x["head.weight"].view(torch.int32)},
        x | {"head.weight": x["head.weight"] + 1},
        {"head.bias" if k == "head.weight" else k: v for k, v in x.items()},
    )
    assert len({tensor_files.content(other) for other in (x, *others)}) == 5


def test_recorded_hashes_of_older_versions_are_known() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode() + value.flatten().view(torch.uint8).numpy().tobytes())
    hashed = weight_files.module_hashes(module)
    assert hashed["sha256"] == total.hexdigest()
    assert weight_files.same({"sha256": hashed["sha256"]}, hashed)
    assert weight_files.same({"sha256": "another file's", "content": hashed["content"]}, hashed)
    assert not weight_files.same({"sha256": hashed["sha256"], "content": "another"}, hashed)
    assert not weight_files.same({"sha256": "another file's"}, hashed)


def deflate(path: Path) -> None:
    """Pack a torch file anew, compressed."""
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in parts.items():
            new.writestr(name, data)


def quantised(x: Tensor) -> Tensor:
    """A tensor of torch's older quantised types, of which newer versions warn."""
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def spoil(how: str, state: dict[str, Any], file: Path) -> None:
    """Write weights that are spoilt in one way."""
    name, first = "blocks.0.mlp.fc1.weight", state["blocks.0.mlp.fc1.weight"]
    values = {
        "int64": first.long(),
        "bool": first > 0,
        "complex64": first + 1j,
        "float8_e4m3fn": first.to(torch.float8_e4m3fn),
        "quantised": quantised(first),
        "sparse": first.to_sparse(),
        "without contents": first.to("meta"),
        "claims": torch.zeros(1).expand(10**10),
        "inflates": torch.zeros(2**22),
        "NaN": torch.full_like(first, torch.nan),
        "inf": first.index_fill(0, torch.tensor([1]), torch.inf),
    }
    changed: Any = state | {name: values[how]} if how in values else state
    if how == "no text":
        changed = state | {7: first}
    if how.startswith("head.weight"):
        changed = state | {"head.weight": 3 if how.endswith("int") else torch.tensor(3.0)}
    if how.startswith("has sides"):
        sides = (300, 300) if "300" in how else (0, 16)
        changed = state | {"patch_embed.proj.weight": torch.ones(1, 3, *sides)}
    if how == "weights is no tensor but":
        changed = {"weights": state}
    if how == "more than 20000":
        changed = dict.fromkeys(map(str, range(20_001)), first)
    torch.save(changed, file)
    if how == "inflates":
        deflate(file)
    if how == "it is empty":
        file.write_bytes(b"")


SPOILT = (
    *("int64", "bool", "complex64", "float8_e4m3fn", "quantised", "sparse", "without contents"),
    *(
        "claims",
        "inflates",
        "no text",
        "head.weight is no tensor but int",
        "weights is no tensor but",
    ),
    *("more than 20000", "it is empty", "has sides .300, 300.", "has sides .0, 16."),
)


@pytest.mark.parametrize("how", [*SPOILT, "head.weight of shape", "NaN", "inf"])
def test_files_that_hold_no_weights_are_refused(
    how: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    spoil(how, state, tmp_path / "bad.pth")
    says = {
        "head.weight of shape": r"a classifier of shape \(\)",
        "NaN": r"blocks\.0\.mlp\.fc1\.weight are not finite",
        "inf": r"blocks\.0\.mlp\.fc1\.weight are not finite",
    }.get(how, how)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"^teacher 't': .*{says}") as caught:
        sources.read(row(tmp_path / "bad.pth"), 4)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("how", ["int64", "bool", "NaN"])
def test_the_same_of_safetensors(how: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    spoil(how, state, tmp_path / "bad.pth")
    plain = torch.load(tmp_path / "bad.pth", weights_only=True)
    save_file(plain, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"fc1\.weight (is|are) .*(not float32|not finite)"):
        sources.read(row(tmp_path / "bad.safetensors"), 4)


def test_counters_and_indices_are_no_weights(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet").state_dict()
    counters = [name for name in model if name.endswith("num_batches_tracked")]
    save_file(model, tmp_path / "cnn.safetensors")
    assert counters and model[counters[0]].dtype == torch.int64
    found = weight_files.state_of(tmp_path / "cnn.safetensors")
    assert weight_files.foreign(found) == weight_files.integers(found, "test_efficientnet") == ""
    index = {"blocks.0.attn.relative_position_index": torch.zeros(4, dtype=torch.int64)}
    assert weight_files.integers(index, ARCH) == ""


def test_headers_are_bounded_and_pipes_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for length in (2**62, 99_000_000):
        file.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(ValueError, match="its header is larger than"):
            tensor_files.Safetensors(file)
    file.unlink()
    os.mkfifo(file)
    for read in (tensor_files.Safetensors, tensor_files.unpickle, weight_files.hashes):
        with pytest.raises(ValueError, match=r"^'.*x\.safetensors' cannot be read"):
            read(file)


def check(path: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, what was printed) of `unic-ds teachers check`."""
    options = ["--recipe", "unic_b", "--student.size", "64", "--teachers.t.precision", "fp32"]
    source = f"t=file:{path}#arch={ARCH}"
    code = entry_point.run(cli.dispatch, ["teachers", "check", *options, "--teachers", source])
    out, err = capfd.readouterr()
    return code, out + err.splitlines()[-1] if err else out


def test_the_verb_shows_text_of_a_file_as_text_and_refuses_nan(
    state: dict[str, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, forged = tmp_path / "t.safetensors", "[/b] MIT\nunic_ds: error: \x1b[2J all is well"
    save_file(state, file, {"licence": forged})
    code, said = check(file, capfd)
    assert code == 0
    assert "[/b] MIT\\nunic_ds: error: \\x1b[2J all is well" in said
    bad = load_file(file) | {"norm.weight\nunic_ds: error: all is well": torch.ones(1)}
    save_file(bad, file)
    code, said = check(file, capfd)
    assert code == 2 and said.count("\n") == 0 and "all is well" in said
    save_file(state | {"norm.weight": state["norm.weight"] * torch.nan}, file)
    code, said = check(file, capfd)
    assert code == 2 and "teacher 't': its weights norm.weight are not finite" in said


def test_a_run_goes_on_with_the_same_weights_in_another_file(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    images, out = tmp_path / "images" / "c", tmp_path / "run"
    images.mkdir(parents=True)
    for i in range(16):
        Image.effect_noise((40, 40), 30 + i).convert("RGB").save(images / f"{i:02d}.png")
    torch.manual_seed(1)
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0).state_dict()
    teacher, init = tmp_path / "t.safetensors", tmp_path / "s.safetensors"
    given: dict[str, Any] = LOST | {"teachers": f"t={row(teacher).source}"}
    given |= {"data__train": images.parent, "data__val_share": 0, "eval__on": "false"}
    given |= {"student__init": init, "teachers__t__precision": "fp32", "optim__steps": 4}

    def go(code: int = 0, licence: str = "MIT", **more: Any) -> str:
        save_file(state, teacher, {"licence": licence})
        save_file(student, init, {"licence": licence})
        return run(alone(out, **(given | more)), code=code)

    go(run__stop_at=2)
    kept = out / "checkpoints" / "step_0000002"
    umask = os.umask(0)
    os.umask(umask)
    for file in (kept / "statistics.safetensors", out / "teachers.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert "resumed after step 2" in go(licence="BSD", run__stop_at=3)
    facts = json.loads((kept / checkpoint.FACTS).read_text())
    hashed = [weight_files.hashes(file) for file in (teacher, init)]
    old = {"teachers": [["t", hashed[0]["sha256"]]], "init": {init.name: hashed[1]["sha256"]}}
    of_files = {row["sha256"]: row["content"] for row in hashed}
    new = {"teachers": facts["teachers"], "init": {init.name: facts["init"]["model.safetensors"]}}
    assert checkpoint.in_contents(old, of_files) == new
    state = state | {"norm.bias": state["norm.bias"] + 1}
    assert "was saved with teachers" in go(code=2)
