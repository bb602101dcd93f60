"""Published checkpoints: imported to the same outputs, or refused without running anything."""

from __future__ import annotations

import builtins
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import parity
import plain
import pytest
import timm
import torch
from safetensors.torch import load_file

from unic_ds import cli
from unic_ds.models import ladder_description
from unic_ds.models.encoder import build_encoder
from unic_ds.process import entry_point
from unic_ds.weights import import_unic

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {"dino_vitbase_16": 20, "deit3": 12}
GIVEN = os.environ.get("UNIC_DS_VECTORS", "")


@pytest.fixture(scope="module")
def specimen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the published layout beside what its program would give."""
    folder = tmp_path_factory.mktemp("published")
    plain.write_published(folder, seed=3, widths=WIDTHS, hidden=(8, 16))
    return folder / "published_format.pth"


@pytest.fixture(scope="module")
def small(specimen: Path) -> dict[str, Any]:
    """The specimen's content, to be spoilt."""
    return torch.load(specimen, weights_only=False)


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unic_ds.cli", "import-unic", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def refuse(file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the verb refuses `file`; nothing may be written."""
    before = sorted(file.parent.iterdir())
    code = entry_point.run(cli.dispatch, ["import-unic", str(file), str(file.parent / "out")])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("unic_ds: error: ") and said.count("\n") == 1
    assert sorted(file.parent.iterdir()) == before
    return said


def given_too(specimen: Path) -> list[Path]:
    """The specimen, and what UNIC_DS_VECTORS names."""
    given = Path(GIVEN) / "published_format.pth"
    return [specimen, given] if GIVEN and given.is_file() else [specimen]


def test_an_imported_checkpoint_gives_its_program_s_outputs(specimen: Path) -> None:
    for file in given_too(specimen):
        assert parity.over(parity.check_published(file)) == []


def test_the_verb_writes_a_model_folder_that_gives_these_outputs(
    specimen: Path, tmp_path: Path
) -> None:
    for i, file in enumerate(given_too(specimen)):
        out = tmp_path / f"model{i}"
        done = run(file, out)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(out)
        names = {"model", "ladder", "statistics"}
        assert {p.name for p in out.iterdir()} == {
            "config.json",
            "ladder.json",
            "README.md",
            *(f"{name}.safetensors" for name in names),
        }
        take = parity.load(file.with_name("published_format_io.npz"))
        encoder = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        with torch.no_grad():
            x_BND = encoder.forward_features(torch.from_numpy(take["image"]))
        for value, key in ((x_BND[:, 0], "clstoken"), (x_BND[:, 1:], "patchtokens")):
            assert parity.error(value, torch.from_numpy(take[f"x_norm_{key}"])) < 1e-4
        ladder, want = load_file(out / "ladder.safetensors"), import_unic.read(file).ladder_state
        assert ladder.keys() == want.keys()
        assert all(torch.equal(value, want[name]) for name, value in ladder.items())
        text = (out / "README.md").read_text()
        assert "imported from published_format.pth (SHA-256 " in text
        assert "license: other\nlicense_name: cc-by-nc-sa-4.0-and-unknown\n" in text
        assert "not for commercial use.** The licence of these weights (CC BY-NC-SA 4.0)" in text
        assert "(CC BY-NC-SA 4.0) forbids commercial use." in text
        assert "\n  licence: CC BY-NC-SA 4.0\n" in text and "name: these weights" not in text
        kept = ladder_description.read(out / "ladder.json")
        assert kept.licence == "CC BY-NC-SA 4.0"
        assert kept.origin.startswith("imported from published_format.pth (SHA-256 ")
        assert "initial affine" not in text  # the specimen's norm is random
        raw = torch.load(file, weights_only=False)["teacher_ft_stats"]
        state = load_file(out / "statistics.safetensors")
        assert state.keys() == {f"{name}.{key}_2C" for name in raw for key in ("mean", "std")}
        for name, kinds in raw.items():
            assert f"| {name} | `unknown` | unknown |" in text
            for i, kind in enumerate(("cls", "patch")):
                for key in ("mean", "std"):
                    want_C = kinds[kind][key].flatten()
                    assert torch.equal(state[f"{name}.{key}_2C"][i], want_C)


def test_a_ladder_s_settings_are_found_in_its_weights(
    small: dict[str, Any], tmp_path: Path
) -> None:
    norms = {"prenorm": True, "midnorm": True}
    plain.write_published(tmp_path, seed=5, widths=WIDTHS, blocks=[3, 7, 11], grid=2, **norms)
    file = tmp_path / "published_format.pth"
    assert parity.over(parity.check_published(file)) == []
    found = import_unic.read(file)
    assert {name: head.width for name, head in found.heads.items()} == WIDTHS
    assert (found.student.model, found.student.size) == ("vit_tiny_patch16_224", 32)
    only_last = {k: v for k, v in small["model"].items() if ".lp." not in k or ".11.layers" in k}
    torch.save(small | {"model": only_last}, file)
    assert import_unic.read(file).ladder.rungs == "11"


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("vit_small_patch16_224", "vit_small_patch16_224"),
        ("vit_base_patch16_224", "vit_base_patch16_224"),
        ("vit_large_patch14_224", "vit_large_patch14_224"),
        ("vit_large_patch14_dinov2", "vit_large_patch14_dinov2"),
        ("vit_giant_patch14_dinov2", "vit_giant_patch14_dinov2"),
        ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_reg4_dinov2"),
        ("vit_small_patch8_224", "vit_small_patch8_224"),
        ("vit_base_patch16_clip_224", None),
        ("vit_huge_patch14_224", None),
    ],
)
def test_the_encoder_s_timm_name_is_found_in_its_weights(model: str, found: str | None) -> None:
    size = 6 * (8 if "patch8" in model else 14 if "patch14" in model else 16)
    with torch.device("meta"):
        encoder = timm.create_model(model, img_size=size, num_classes=0)
    state = {k: torch.zeros(1).expand(v.shape) for k, v in encoder.state_dict().items()}
    if "reg4" in model:  # DINOv2 keeps a position for CLS
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.zeros(1).expand(1, 37, encoder.embed_dim)
    if "giant" in model:
        state = {k.replace("fc1", "w12").replace("fc2", "w3"): v for k, v in state.items()}
    state["mask_token"] = torch.zeros(1, encoder.embed_dim)
    if found is None:
        with pytest.raises(ValueError, match="no ViT of timm has these encoder weights"):
            import_unic.student_of(state)
        return
    student, renamed = import_unic.student_of(state)
    assert (student.model, student.size) == (found, size)
    with torch.device("meta"):
        assert build_encoder(student).state_dict().keys() == renamed.keys()


class Evil:
    """Unpickled by anything but a restricted loader, it calls `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch {mark}", "posix.system"),
        (builtins.open, "{mark}", "open"),
        (builtins.exec, "open('{mark}', 'w')", "exec"),
        (np.fromfile, "{mark}", "numpy.fromfile"),
        (np.load, "{mark}", "numpy.load"),
        (shutil.rmtree, "{mark}", "shutil.rmtree"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle4"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(
    function: Any,
    argument: str,
    name: str,
    form: str,
    small: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, mark = tmp_path / "evil.pth", tmp_path / "mark"
    mode = ("w",) if function is builtins.open else ()
    bad = small | {"args": Evil(function, argument.format(mark=mark), *mode)}
    if form.startswith("pickle"):
        file.write_bytes(pickle.dumps(bad["args"], protocol=int(form[-1])))
    else:
        torch.save(bad | {"model": {}}, file, _use_new_zipfile_serialization=form == "zip")
    said = refuse(file, capsys)
    # torch.save writes protocol 2; of a later one torch's reader knows too little to tell names
    want = "cannot be read as a checkpoint: Unsupported operand" if form == "pickle4" else name
    assert want in said
    assert "weights_only" not in said
    assert not mark.exists()


def test_a_malicious_pickle_is_refused_by_the_command(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"model": Evil(os.system, f"touch {mark}")}, tmp_path / "evil.pth")
    done = run(tmp_path / "evil.pth", tmp_path / "out")
    assert done.returncode == 2
    assert "is refused: it names posix.system" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pth"]


def test_files_written_by_numpy_1_are_read(specimen: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(specimen) as old, zipfile.ZipFile(tmp_path / "1.pth", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n_reconstruct\n" in data
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            new.writestr(name, data)
    assert torch.equal(
        import_unic.read(tmp_path / "1.pth").encoder_state["cls_token"],
        import_unic.read(specimen).encoder_state["cls_token"],
    )


def spoil(specimen: Path, how: str) -> bytes:
    """The specimen's bytes, damaged."""
    data = bytearray(specimen.read_bytes())
    if how == "cut":
        return bytes(data[: len(data) // 2])
    if how == "flipped":
        data[len(data) // 2] ^= 1
        return bytes(data)
    return {"empty": b"", "text": b"no checkpoint\n" * 99, "json": b'{"model": 1}'}[how]


def test_an_archive_that_inflates_is_refused_unread(
    specimen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for spoilt in ("data.pkl", "data/0"):
        file = tmp_path / "bad.pth"
        with zipfile.ZipFile(specimen) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name.endswith(spoilt):
                    new.writestr(name, data + bytes(2**26), zipfile.ZIP_DEFLATED)
                else:
                    new.writestr(name, data)
        assert file.stat().st_size < 2**26
        assert f"{spoilt} inflates from " in refuse(file, capsys)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text", "json"])
def test_a_damaged_file_is_refused(
    how: str, specimen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.pth").write_bytes(spoil(specimen, how))
    assert "cannot be read as a checkpoint" in refuse(tmp_path / "bad.pth", capsys)


def nested() -> torch.Tensor:
    """A tensor of a kind that torch warns of."""
    with warnings.catch_warnings(action="ignore"):
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def changed(checkpoint: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The checkpoint with one entry of its model replaced, or left out."""
    model = {k: v for k, v in checkpoint["model"].items() if k != name}
    return checkpoint | {"model": model if value is None else model | {name: value}}


QKV = "module.encoder.blocks.0.4.attn.qkv.weight"
HEAD = "module.lp.heads.deit3.patch.11.layers.2.weight"


@pytest.mark.parametrize(
    ("spoilt", "sentence"),
    [
        (lambda c: [1], "holds no checkpoint but a list"),
        (lambda c: {"state_dict": {}}, "model is missing"),
        (lambda c: c["model"], "model is missing"),
        (lambda c: c | {"teacher_ft_stats": None}, "teacher_ft_stats is not of the ladder's"),
        (lambda c: c | {"teacher_ft_stats": {k: {} for k in WIDTHS}}, "dino_vitbase_16 is missing"),
        (lambda c: changed(c, "module.decoder.x", torch.ones(1)), "neither of the encoder nor"),
        (lambda c: changed(c, QKV, None), "blocks.4.attn.qkv.weight is missing"),
        (lambda c: changed(c, QKV, torch.ones(3, 3)), "blocks.4.attn.qkv.weight is (3, 3), not"),
        (lambda c: changed(c, QKV, torch.full((576, 192), torch.nan)), "is not finite"),
        (lambda c: changed(c, QKV, "text"), "is no tensor of weights"),
        (lambda c: changed(c, QKV, torch.ones(576, 192).long()), "is int64, not float32"),
        (lambda c: changed(c, QKV, torch.ones(576, 192).to(torch.float8_e4m3fn)), "is float8"),
        (lambda c: changed(c, QKV, torch.ones(576, 192, device="meta")), "is without contents"),
        (lambda c: changed(c, QKV, nested()), "that is nested"),
        (lambda c: changed(c, QKV, torch.ones(1).expand(10**10)), "bytes of tensors in"),
        (lambda c: changed(c, "a\nb", torch.ones(1)), "a\\nb is neither of the encoder"),
        (lambda c: changed(c, 3, torch.ones(1)), "3, which is no tensor of weights"),
        (lambda c: changed(c, QKV, dict.fromkeys(range(20_001), 0)), "is no tensor but dict"),
        (lambda c: c | {"model": dict.fromkeys(map(str, range(20_001)), 0)}, "more than 20000"),
        (lambda c: changed(c, QKV.replace(".4.", ".12."), torch.ones(1)), "qkv.weight is unknown"),
        (lambda c: changed(c, "module.encoder.cls_token", None), "the encoder has no cls_token"),
        (
            lambda c: changed(c, "module.encoder.pos_embed", torch.ones(1, 19, 192)),
            "pos_embed is (1, 19, 192), no square grid and CLS",
        ),
        (lambda c: changed(c, HEAD, None), f"{HEAD.removeprefix('module.lp.')} is missing"),
        (
            lambda c: c | {"model": {k: v for k, v in c["model"].items() if ".lp." not in k}},
            "the ladder has no projectors",
        ),
    ],
)
def test_another_layout_is_refused(
    spoilt: Any,
    sentence: str,
    small: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(spoilt(small), tmp_path / "bad.pth")
    assert sentence in refuse(tmp_path / "bad.pth", capsys)


def test_what_the_verb_wants(
    specimen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "there is no file" in refuse(tmp_path / "none.pth", capsys)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for nameless in ("", ".", "c/.."):
        assert entry_point.run(cli.dispatch, ["import-unic", str(specimen), nameless]) == 2
        assert "names no new folder" in capsys.readouterr().err
    assert entry_point.run(cli.dispatch, ["import-unic", str(specimen)]) == 2
    assert "import-unic needs PATH and OUT" in capsys.readouterr().err
    assert entry_point.run(cli.dispatch, ["import-unic", "a", "b", "--fast", "1"]) == 2
    assert "unknown option --fast" in capsys.readouterr().err
    assert entry_point.run(cli.dispatch, ["import-unik", "a", "b"]) == 2
    assert "unknown verb" in capsys.readouterr().err
    assert entry_point.run(cli.dispatch, ["import-unic", "--help"]) == 0
    assert "import-unic PATH OUT" in capsys.readouterr().out
    assert entry_point.run(cli.dispatch, ["import-unic", str(specimen), "/proc/out"]) == 1
    assert "'/proc/out' cannot be written" in capsys.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    assert (
        entry_point.run(cli.dispatch, ["import-unic", str(specimen), str(tmp_path / "thesis")]) == 2
    )
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
