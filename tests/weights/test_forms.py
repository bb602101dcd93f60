"""The table of a student's forms, on a run's folder with exports of real formats."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from handed_over import images, student_folder
from PIL import Image
from safetensors.torch import load_file, save_file

from unic_ds import cli
from unic_ds.config import overrides, recipes
from unic_ds.process import entry_point
from unic_ds.training import form_comparison
from unic_ds.training.hand_over import Request, hand_over
from unic_ds.weights.formats import FORMATS, form_table, forms
from unic_ds.weights.formats.fresh_process import FreshProcess

SHARES = "numpy.zeros((len(images), 2), numpy.float32)"
TRAIN, VAL = 12, 10
"""Images of a class."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with labelled images and a student of random weights."""
    root = tmp_path_factory.mktemp("forms")
    draws = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(draws.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                coarse.resize((48, 48)).save(root / split / name / f"{i}.png")
    student_folder(root / "run" / "student")
    write_settings(root / "run", train=root / "train", val=root / "val")
    return root / "run"


def write_settings(run: Path, *, train: Path, val: Path | str) -> None:
    """Write the settings of a run on these images."""
    given = {"data.train": str(train), "data.val": str(val), "data.val_share": "0"}
    cfg = overrides.override_all(recipes.get("quickstart"), given)
    (run / "config.yaml").write_text(yaml.safe_dump(overrides.to_dict(cfg), sort_keys=False))


def shaken(folder: Path, out: Path, deviation: float) -> Path:
    """A copy of a model folder whose weights have noise."""
    shutil.copytree(folder, out)
    draws = torch.Generator().manual_seed(0)
    state = load_file(out / "model.safetensors")
    for value in state.values():
        value.add_(torch.randn(value.shape, generator=draws) * deviation)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return out


def forms_of(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the verb."""
    code = entry_point.run(cli.dispatch, ["forms", *map(str, words)])
    return (code, *capsys.readouterr())


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells of a table in Markdown by the first of a row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert re.fullmatch(r"[|-]+", lines[1]) and len({len(row) for row in cells}) == 1
    return {row[0]: row[1:] for row in cells if not row[0].startswith("-")}


def test_the_verb_compares_a_student_with_the_folders_beside_it(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    shaken(copied / "student", copied / "student_near", 1e-4)
    text = FORMATS["openclip"].library
    (copied / "student_openclip").mkdir()
    (copied / "student_openclip" / "README.md").write_text(f"---\nlibrary_name: {text}\n---\n")
    (copied / "student_notes").mkdir()  # no export
    code, out, err = forms_of(capsys, copied, "--threads", 1)
    assert code == 0 and "student_openclip is left out: open_clip has no tokens" in err
    rows = rows_of(out)
    assert list(rows) == ["form", "student", "student_near"]
    own, near = rows["student"], rows["student_near"]
    size = (copied / "student" / "model.safetensors").stat().st_size
    assert own[:2] == near[:2] == ["timm", f"{size / 1e6:.2f}"]
    assert own[5:] == ["", "", "", ""]
    cosines, fidelities = map(float, near[5:7]), [float(x.replace(",", "")) for x in near[7:]]
    assert all(0.999 < x <= 1 for x in cosines) and all(100 < x < 1e6 for x in fidelities)
    for cell, most in ((near[2], 50), (near[3], 50)):
        ms, ratio = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell).groups()
        assert float(ms) > 0 and 1 / most < float(ratio) < most
    assert f"k=10, {2 * TRAIN} training and {2 * VAL} validation images" in out
    accuracy = float(own[4])
    assert (accuracy * 2 * VAL / 100) == pytest.approx(round(accuracy * 2 * VAL / 100))
    assert f"with 1 thread on {form_table.cores()} cores of" in out
    assert f"torch {torch.__version__.partition('+')[0]}" in out


@pytest.mark.slow
def test_exports_of_other_sizes_and_libraries_are_compared(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = hand_over(Request(source=run, to="onnx", quantize="int8", keep=("narrow",)))
    larger = hand_over(Request(source=run, size=48))
    code, out, _ = forms_of(capsys, run / "student", onnx, larger)
    assert code == 0
    rows = rows_of(out)
    assert list(rows)[1:] == ["student", "student_onnx_int8", "student_timm_48px"]
    assert float(rows["student_onnx_int8"][1]) < 0.9 * float(rows["student"][1])
    assert 0.98 < float(rows["student_onnx_int8"][6]) < 1
    cls, patch = rows["student_timm_48px"][5:7]
    assert 0 < float(cls) < 1 and patch == ""  # 9 patches are not 4
    assert "student_onnx_int8 computes narrow_cls too" in out
    assert "student_timm_48px takes images of 48 px, the student takes 32 px" in out
    count = "session.get_session_options().intra_op_num_threads"
    running = f"outputs = {{'cls': np.array([[{count}]])}}"
    asking = replace(FORMATS["onnx"], running=running)
    with FreshProcess(asking, onnx, named="it", threads=1) as process:
        assert process.outputs(images(32))["cls"].tolist() == [[1]]


def test_what_cannot_be_compared_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(message: str, *words: object) -> None:
        code, out, err = forms_of(capsys, *words)
        assert code == 2 and out == "" and re.search(message, err), err

    student = run / "student"
    (tmp_path / "empty").mkdir()
    refused("is no folder; give an export", run, tmp_path / "nowhere")
    refused("is no export: no model card in it names", run, tmp_path / "empty")
    refused("cannot be compared: it is neither a model folder", tmp_path / "empty", student)
    refused("would be compared with itself; give it once", run, student)
    refused("has no exports beside it; make some by unic-ds export", student)
    refused("--threads is 10000, but this process may use", run, student, "--threads", 10000)
    refused("--threads is -1", run, student, "--threads", -1)
    for library, message in (
        ("open_clip", "is an export for open_clip, whose outputs are no tokens.*leave it out"),
        ("onnx", "holds no weights for onnxruntime; export it again"),
    ):
        (tmp_path / "empty" / "README.md").write_text(f"---\nlibrary_name: {library}\n---\n")
        refused(message, run, tmp_path / "empty")
    (tmp_path / "empty" / "model.onnx").touch()
    (tmp_path / "empty" / "preprocessing.json").write_text('{"size": "large"}')
    refused("preprocessing.json' has no image size", run, tmp_path / "empty")
    (tmp_path / "empty" / "preprocessing.json").write_text("[")
    refused("preprocessing.json' cannot be read", run, tmp_path / "empty")


def test_a_form_that_fails_is_named_with_its_last_line(tmp_path: Path) -> None:
    plain = replace(FORMATS["timm"], loading="import numpy\n", binding="")

    def failing(form: object, **settings: object) -> str:
        with (
            pytest.raises(RuntimeError) as caught,
            FreshProcess(form, tmp_path, named="student_x", **settings) as process,
        ):
            process.outputs(images(32))
        return str(caught.value)

    named = "a fresh process cannot run student_x"
    found = failing(replace(plain, loading="import unic_ds"))
    assert found == f"{named} (ImportError: unic_ds is not to be imported)"
    noisy = "print('to stdout')\nassert input() == 'an answer'"
    assert failing(replace(plain, running=noisy)).startswith(f"{named} (EOFError")
    assert failing(replace(plain, running="import os; os._exit(7)")) == f"{named} (exit code 7)"
    working = replace(plain, running=f"print('to stdout'); outputs = {{'cls': {SHARES}}}")
    with FreshProcess(working, tmp_path, named="x", threads=1) as process:
        assert process.outputs(images(32), names=("cls",))["cls"].shape == (8, 2)
        assert len(process.seconds(images(32), runs=3)) == 3
        process.process.kill()
        process.process.wait()
        with pytest.raises(RuntimeError, match=r"cannot run x .exit code -9"):
            process.outputs(images(32))
    assert not process.work.exists()
    bad = {"cls": torch.full((1, 2), float("nan"))}
    row = forms.read_form(student_folder(tmp_path / "student"), "student_x")
    with pytest.raises(RuntimeError, match="student_x gives cls tokens that are NaN"):
        forms.check(row, bad)
    with pytest.raises(RuntimeError, match="student_x gives image, and no cls"):
        forms.check(row, {"image": torch.zeros(1, 2)})


def test_agreement_is_that_of_the_glossary(tmp_path: Path) -> None:
    row = forms.Measures(forms.read_form(student_folder(tmp_path / "student"), "student"))
    draws = torch.Generator().manual_seed(0)
    cls_BD = torch.randn(4, 6, generator=draws) + 3
    patch_BND = torch.randn(4, 5, 6, generator=draws)
    error_BD = 0.1 * torch.randn(4, 6, generator=draws)
    for part in (slice(0, 1), slice(1, 4)):
        target = {"cls": cls_BD[part], "patch": patch_BND[part]}
        found = {"cls": (cls_BD + error_BD)[part], "patch": patch_BND[part, :-1]}
        forms.add_agreement(row, target, found)
    assert set(row.agreement) == {"cls"}  # of patches there are others
    measures = row.agreement["cls"].measures()
    variance = cls_BD.double().var(0, correction=0).sum()
    assert measures["fidelity"] == pytest.approx(
        float(variance / error_BD.square().sum(1).mean()), rel=1e-5
    )
    cosine = torch.cosine_similarity(cls_BD, cls_BD + error_BD).mean()
    assert measures["cosine"] == pytest.approx(float(cosine), abs=1e-6)


def test_images_without_labels_or_a_run_leave_knn_out(run: Path, tmp_path: Path) -> None:
    found = form_comparison.pictures_of(None, [32, 48])
    assert found.labelled is None and found.bank == 0 and "images of noise" in found.notes[0]
    (small,), (large,) = found.batches[32], found.batches[48]
    assert small.shape == (8, 3, 32, 32) and large.shape == (8, 3, 48, 48)
    shown = form_comparison.resized(large, 32).float()
    assert (shown - small).abs().mean() < small.float().std() / 2
    write_settings(tmp_path, train=run.parent / "train" / "a", val="")
    cfg = recipes.read(tmp_path / "config.yaml")
    found = form_comparison.pictures_of(cfg, [32])
    assert sum(map(len, found.batches[32])) == TRAIN and "kNN: not measured" in found.notes[0]
    labelled = form_comparison.pictures_of(recipes.read(run / "config.yaml"), [32, 48])
    counts = [len(batch) for batch in labelled.batches[48]]
    assert sum(counts[: labelled.bank]) == 2 * TRAIN and sum(counts[labelled.bank :]) == 2 * VAL
    assert (
        form_comparison.busy(0.1, 2) == [] and "load average 1.5" in form_comparison.busy(1.5, 2)[0]
    )


def test_a_name_cannot_break_the_table(tmp_path: Path) -> None:
    form = forms.read_form(student_folder(tmp_path / "student"), "a|b\n[red]")
    row = forms.Measures(form, seconds={count: [0.001 * count] for count in forms.BATCHES})
    text = form_table.render([row], labelled=None, threads=2, notes=["on images"])
    lines = text.splitlines()
    assert lines[2].startswith("| a\\|b\\n[red] | timm") and lines[2].endswith("|")
    assert "with 2 threads" in text and lines[-1] == "on images"
