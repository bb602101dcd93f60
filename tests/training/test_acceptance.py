"""`unic-ds check` and `plan` refuse what train refuses in its first minute, with its sentence."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pictures
import pytest
import timm
from forked import Forked
from runs import ROOT, TRAIN, run
from safetensors.torch import save_file

from unic_ds import cli, config
from unic_ds.models.encoder import build_encoder
from unic_ds.process import entry_point

SMALL = "a=python:small_teacher:narrow,b=python:small_teacher:wide"
MODELS = {
    "unknown student": ({"student.model": "nope"}, "student.model 'nope' is not a timm model"),
    "no plain ViT": ({"student.model": "cait_xxs24_224"}, "'cait_xxs24_224' is not a plain ViT"),
    "size": ({"student.size": "40"}, "student.size 40 is not a multiple of"),
    "registers": (
        {"student.model": "deit_tiny_distilled_patch16_224", "student.registers": "2"},
        "student.registers 2 does not fit",
    ),
    "rungs": ({"ladder.rungs": "3,12"}, "ladder.rungs names block 12; the student's last is 11"),
    "a teacher's rungs": ({"teachers.b.rungs": "12"}, "names block 12"),
    "mean": ({"teachers.a.mean": "123.7,116.3,103.5"}, "teachers.a.mean must be in [0, 1]"),
    "timm's name": ({"teachers": "t=timm:nope"}, "model: 'nope'|timm has no model 'nope'"),
    "block": (
        {"teachers": "t=file:{file}#arch=test_vit", "teachers.t.block": "99"},
        "teachers.t.block must be",
    ),
    "side": (
        {"teachers": "t=file:{file}#arch=test_vit", "teachers.t.size": "50"},
        "teachers.t.size must be a multiple of its patch 16",
    ),
    "a side that the model lacks": (
        {"teachers": "t=file:{file}#arch=swin_tiny_patch4_window7_224", "teachers.t.size": "3"},
        "teacher 't'",
    ),
    "no Linears": (
        {"teachers": "t=file:{file}#arch=test_efficientnet", "teachers.t.precision": "int8"},
        "teachers.t.precision must be bf16 or fp32",
    ),
    "stages": (
        {"stages": "student.model=vit_small_patch16_224"},
        "stage 2 of 2: student.model 'vit_tiny_patch16_224' cannot start from",
    ),
    "a stage": (
        {"stages": "student.size=24"},
        "stage 1 of 2: student.size 24 is not a multiple of",
    ),
}
"""Refused by `plan` too, which needs neither weights nor images."""
FILES = {
    "no weights": ({"teachers": "t=timm:vit_tiny_patch16_224"}, "is not in the cache; run"),
    "other weights": ({"teachers": "t=file:{file}#arch=vit_tiny_patch16_224"}, "do not fit vit_"),
    "no module": ({"teachers": "t=python:nowhere:build"}, "cannot import 'nowhere'"),
    "eight-bit units": ({"teachers.a.precision": "fp8_dynamic"}, "needs a GPU of compute"),
    "PHI-S": (
        {
            "standardise.kind": "phi_s",
            "standardise.fit_steps": "2",
            "teachers": "t=python:seven_wide:build",
        },
        "teacher 't': no Hadamard matrix of width 7",
    ),
    "no image": ({"data.train": "{empty}"}, "below"),
    "foreign classes": ({"data.val": "{foreign}"}, "has class folder 'other'"),
    "no manifest": ({"teachers.cache": "{empty}"}, "holds no manifest.json"),
    "initial weights": ({"student.init": "{file}"}, "does not fit vit_tiny_patch16_224"),
    "ranks": ({"ranks": "3"}, "is not a multiple of 3 ranks"),
}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Folders and files that the cases name."""
    root = tmp_path_factory.mktemp("there")
    pictures.folder(root / "photos", 6)
    pictures.folder(root / "foreign" / "in", 2)
    (root / "foreign" / "in").rename(root / "foreign" / "other")
    (root / "empty" / "a").mkdir(parents=True)
    (root / "tars").mkdir()
    save_file(timm.create_model("test_vit").state_dict(), root / "vit.safetensors")
    student = build_encoder(config.Student(model="vit_tiny_patch16_224", size=32))
    save_file(student.state_dict(), root / "init.safetensors")
    (root / "seven_wide.py").write_text(
        "from small_teacher import Small\n\n\ndef build():\n    return Small(7)\n"
    )
    return root


def command(there: Path, **changes: str) -> list[str]:
    """Options of a small run with those changes."""
    options = {
        "ds_config": str(ROOT / "ds_configs" / "zero2.json"),
        "recipe": "unic_b",
        "precision": "fp32",
        "student.model": "vit_tiny_patch16_224",
        "student.size": "32",
        "teachers": SMALL,
        "optim.batch_size": "8",
        "data.train": str(there / "photos"),
        "out": str(there / "run"),
    }
    names = ("photos", "foreign", "empty", "tars")
    places = {name: there / name for name in names}
    places |= {"file": there / "vit.safetensors", "init": there / "init.safetensors"}
    for key, value in changes.items():
        options[key] = value.format(**places)
    return [word for key, value in options.items() for word in (f"--{key}", value)]


def refused(capfd, words: list[str], sentences: str) -> None:
    """Assert that a verb prints one of the sentences, alone, and has exit code 2."""
    code = entry_point.run(cli.dispatch, words)
    out, err = capfd.readouterr()
    assert code == 2, out + err
    assert any(sentence in err for sentence in sentences.split("|")), err
    assert err.startswith("unic_ds: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_are_refused_by_check_and_plan(there, case, capfd):
    changes, sentence = MODELS[case]
    words = command(there, **changes)
    refused(capfd, ["check", *words], sentence)
    refused(capfd, ["plan", "--gpus", "1", *words], sentence)


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_used_are_refused_by_check(there, case, capfd, monkeypatch):
    monkeypatch.syspath_prepend(str(there))
    changes, sentence = FILES[case]
    refused(capfd, ["check", *command(there, **changes)], sentence)
    assert not (there / "run").exists()


@pytest.mark.parametrize("case", ["no plain ViT", "a teacher's rungs", "stages"])
def test_train_refuses_them_before_it_makes_a_folder(there, case):
    changes, sentence = MODELS[case]
    said = run(Forked(1, [TRAIN, *command(there, **changes)]), code=2)
    assert sentence in said and "Traceback" not in said
    assert not (there / "run").exists()


def test_what_can_be_trained_is_said_and_nothing_is_written(there, capfd):
    with tarfile.open(there / "tars" / "0.tar", "w") as tar:
        tar.add(next((there / "photos").rglob("*.jpg")), "a.jpg")
    before = sorted(there.rglob("*"))
    for changes, line in (
        ({"teachers": "t=file:{file}#arch=test_vit", "teachers.t.precision": "int8"}, ""),
        ({"stages": "student.size=16", "student.init": "{init}"}, ""),
        ({"data.val": "{photos}"}, ""),
        ({"data.train": "{tars}"}, "its tar shards have no index yet"),
    ):
        assert (
            entry_point.run(cli.dispatch, ["check", *command(there, **changes), "--ranks", "2"])
            == 0
        )
        out, err = capfd.readouterr()
        assert out.splitlines()[-1] == f"unic_b in {there / 'run'} can be trained by 2 ranks", err
        assert line in out
    assert sorted(there.rglob("*")) == before
