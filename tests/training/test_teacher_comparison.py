"""`unic-ds teachers compare`: real teachers on real files, on one and two ranks; its refusals."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from pictures import folder
from PIL import Image
from runs import ROOT, TRAIN, run, tiny
from timm_teacher import save_vits
from torch import Tensor
from torch.nn import functional as F

from unic_ds import cli, config, data
from unic_ds.cli import trained_check
from unic_ds.config import job, recipes
from unic_ds.evaluate.features import Model, Outputs
from unic_ds.evaluate.quarters import Quarters, summarised
from unic_ds.harness import models
from unic_ds.harness.image_sets import SampledImages, turns
from unic_ds.process import entry_point
from unic_ds.training import gradient_conflict

COMPARE = [str(ROOT / "unic_ds" / "cli" / "__main__.py"), "teachers", "compare"]
IMAGES = 25
"""An odd number: two ranks have unequal shares."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes and the weights of two teachers."""
    root = tmp_path_factory.mktemp("compare")
    folder(root / "images" / "train", IMAGES)
    folder(root / "images" / "val", 4)
    save_vits(root, "ab")
    return root


def words_of(root: Path, *more: object) -> list[str]:
    teachers = ",".join(f"{x}=file:{root / x}.safetensors#arch=test_vit" for x in "ab")
    words = ["--teachers", teachers, "--data.train", root / "images" / "train"]
    words += ["--student.model", "test_vit", "--student.size", 32, "--data.threads", 1]
    return list(map(str, [*words, "--eval.cache", root / "cache", *more]))


@pytest.fixture(scope="module")
def first(made: Path) -> tuple[str, dict[str, Any]]:
    """Output of the first call, and the JSON that it writes."""
    printed = run(Forked(1, [*COMPARE, *words_of(made, "--out", made / "out")]))
    return printed, json.loads((made / "out" / "teacher_comparison.json").read_text())


def cells(printed: str) -> list[list[str]]:
    """Rows of the tables."""
    rows = (line.strip().strip("│┃").replace("┃", "│") for line in printed.splitlines())
    return [[cell.strip() for cell in row.split("│")] for row in rows if "│" in row]


@pytest.mark.dist
def test_the_tables_have_the_numbers_of_the_file(
    made: Path, first: tuple[str, dict[str, Any]]
) -> None:
    printed, found = first
    rows = cells(printed)
    assert found["images"] == IMAGES and list(found["teachers"]) == ["a", "b"]
    for name, facts in found["teachers"].items():
        assert facts["parameters"] > 100_000 and facts["gflops"] > 0 and facts["size"] == 32
        for kind, x in facts["tokens"].items():
            shown = [f"{x['norm_mean']:.2f}", f"{x['norm_std']:.2f}", f"{x['rankme']:.1f}"]
            shown += [f"{x['participation']:.1f}", str(x["components"]), f"{x['dispersion']:.2f}"]
            assert [name, kind, str(x["width"]), *shown] in rows
    assert [pair["kind"] for pair in found["pairs"]] == ["cls", "patch"]
    for pair in found["pairs"]:
        values = [pair[k] for k in ("cka", "mutual_knn", "r2_of_second", "r2_of_first")]
        assert ["a", "b", pair["kind"], *(f"{x:.2f}" for x in values)] in rows
    accuracy = found["labelled"]["accuracy"]
    assert ["all classes", str(IMAGES), *(f"{accuracy[n]:.1f}" for n in "ab"), ""] in rows
    assert {row["name"] for row in found["labelled"]["classes"]} == {"class_0", "class_1"}
    steps = found["selection"]["steps"]
    assert {step["teacher"] for step in steps} == {"a", "b"} and steps[-1]["coverage"] == 1
    assert steps[-1]["cost"] == pytest.approx(sum(x["gflops"] for x in found["teachers"].values()))
    assert "wrote teacher_comparison.json" in printed
    picture = Image.open(made / "out" / "teacher_comparison.png")
    assert picture.width > 600 and len(np.unique(np.asarray(picture))) > 20


def test_the_printed_command_trains_students_without_each_teacher(
    first: tuple[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = (line for line in first[0].splitlines() if line.startswith("  unic-ds ablate "))
    assert entry_point.run(cli.dispatch, [*shlex.split(line)[1:], "--dry_run", "true"]) == 0
    printed = capsys.readouterr().out
    assert all(cell in printed for cell in ("only-a", "only-b")) and "seed" in printed


def test_the_command_is_of_the_chosen_teachers_alone(made: Path) -> None:
    """The last teacher is left out, with its options; settings that agree are not repeated."""
    teachers = "a=timm:test_vit,b=timm:test_vit,c=timm:test_vit"
    given = {"recipe": "unic_b", "teachers": teachers, "data.train": str(made / "images")}
    given |= {"teachers.b.size": "64", "teachers.c.size": "32", "student.size": "48"}
    given |= {"seed": "3", "teachers.b.rungs": "11"}
    cfg = job.configure("unic_b", {k: v for k, v in given.items() if k != "recipe"})
    words = shlex.split(trained_check.command(given, cfg, ["b", "a"]))[3:]
    found = dict(zip(words[::2], words[1::2], strict=True))
    assert found["--teachers"] == "a=timm:test_vit,b=timm:test_vit"
    assert found["--teachers.b.size"] == "64" and "--teachers.c.size" not in found
    assert not {"--seed", "--teachers.b.rungs"} & found.keys()
    assert found["--student.size"] == "48" and "--stages" not in found
    assert found["--data.val_share"] == "0.25"
    alone = trained_check.command(given, cfg, ["c"])
    assert teachers in alone and "--teachers.c.size 32" in alone


@pytest.mark.dist
def test_a_second_call_runs_no_forward_and_two_ranks_find_the_same(
    made: Path, first: tuple[str, dict[str, Any]]
) -> None:
    printed, found = first
    assert printed.count("to be cached") == 1
    parts = {file: file.stat().st_mtime_ns for file in made.glob("cache/*/*.safetensors")}
    again = run(Forked(1, [*COMPARE, *words_of(made, "--json")]))
    assert "to be cached" not in again and len(parts) == 2
    assert parts == {file: file.stat().st_mtime_ns for file in made.glob("cache/*/*.safetensors")}
    assert json.loads(again.splitlines()[-1]) == found
    words = words_of(made, "--json", "--out", made / "out2")
    words[words.index("--eval.cache") + 1] = "none"
    printed = run(Forked(2, [*COMPARE, *words]))
    other = json.loads((made / "out2" / "teacher_comparison.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == other
    for pair, same in zip(found["pairs"], other["pairs"], strict=True):
        assert pair == pytest.approx(same, abs=1e-4)
    assert other["labelled"] == found["labelled"]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "one teacher": (["--teachers", "a=timm:test_vit"], "needs two teachers or more, got 1"),
    "no student": (["--student", "/nowhere"], "--student '/nowhere' does not exist"),
    "few images": (["--images", "10"], "--images must be from 20 to 20,000, got 10"),
    "no budget": (["--budget", "0"], "--budget must be positive, got 0.0"),
    "no folder": (["--data.train", "/nowhere"], "'/nowhere' does not exist"),
    "a budget that no teacher fits": (["--budget", "1e-9"], "fits no teacher: the cheapest"),
    "a folder that is no run": (["--student", "IMAGES"], "is neither a model folder"),
    "a small folder": (["--data.train", "IMAGES/val"], "has 4 images, but a comparison needs 20"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(
    made: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given, sentence = MISTAKES[case]
    given = [word.replace("IMAGES", str(made / "images")) for word in given]
    words = words_of(made, "--out", made / "never", "--eval.cache", made / "no_cache")
    pairs = dict(zip(words[::2], words[1::2], strict=True)) | {given[0]: given[1]}
    argv = ["teachers", "compare", *(word for pair in pairs.items() for word in pair)]
    assert entry_point.run(cli.dispatch, argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("unic_ds: error: ") and said.count("\n") == 1 and sentence in said
    assert not (made / "never").exists() and not (made / "no_cache").exists()


@pytest.mark.dist
def test_gradients_of_a_run_are_those_of_its_losses(made: Path) -> None:
    """Against the losses' own terms and autograd, on the same images."""
    run(Forked(1, [TRAIN, *tiny(made / "images", made / "run", {"eval.on": "false"})]))
    file = made / "run" / "config.yaml"
    words = ["--student", made / "run", "--out", made / "run", "--json"]
    printed = run(Forked(1, [*COMPARE, *map(str, words), "--eval.cache", "none"]))
    found = json.loads(printed.splitlines()[-1])["gradients"]
    assert found["teachers"] == ["narrow", "wide"] and found["images"] == IMAGES
    np.testing.assert_allclose(found["cosine"], plain_cosines(file), atol=1e-3)
    assert json.loads((made / "run" / "teachers.json").read_text()).keys() == {"narrow", "wide"}
    cfg = recipes.read(file)
    others = tuple(replace(row, source="timm:test_vit") for row in cfg.teachers)
    with pytest.raises(ValueError, match=r"its teacher narrow is .* not output of timm:test_vit"):
        gradient_conflict.open_student(made / "run", replace(cfg, teachers=others))


def plain_cosines(file: Path) -> list[Any]:
    """Cosines of the gradients of 1 - cosine + smooth-L1 of both kinds of token, image by image."""
    cfg = recipes.read(file)
    conflict = gradient_conflict.open_student(file.parent, cfg)
    names = [row.name for row in cfg.teachers]
    teachers = models.build(names, cfg, torch.device("cpu"), export=lambda run: run)
    images = SampledImages(data.scan(cfg.data.train), cfg, IMAGES, balanced=True)
    rows: list[list[Tensor]] = [[], []]
    for batch in images.batches([32]):
        shared = conflict.predict(batch.images[32])
        for t, teacher in enumerate(teachers):
            tokens = (teacher.encode(batch.images[32], gradient_conflict.PROJECTION)).projection
            target = conflict.statistics[teacher.name](tokens[teacher.name]).standardised()
            loss = torch.zeros(())
            for x_C, y_C in zip(shared.pred[teacher.name], target, strict=True):
                near_C = F.smooth_l1_loss(x_C, y_C, reduction="none").mean(-1)
                one_B = 1 - F.cosine_similarity(x_C, y_C, dim=-1) + near_C
                loss = loss + (one_B if one_B.ndim == 1 else one_B.mean(1)).sum() / 4
            grads = torch.autograd.grad(loss, shared.features, retain_graph=True)
            rows[t].append(torch.cat([x.flatten() for x in grads]))
    grad_TM = F.normalize(torch.stack([torch.cat(parts) for parts in rows]).double())
    return (grad_TM @ grad_TM.T).tolist()


def test_classes_take_turns() -> None:
    label_N = np.array([0, 0, 0, 1, 2, 2, -1], dtype=np.int32)
    assert turns(label_N).tolist() == [0, 3, 4, 6, 1, 5, 2]


def test_a_sample_is_spread_over_the_classes(tmp_path: Path) -> None:
    folder(tmp_path, 20)
    for number in range(2, 9):  # class_1 keeps three of ten
        (tmp_path / "class_1" / f"{2 * number + 1:03d}.jpg").unlink()
    source = data.scan(str(tmp_path))
    for balanced, counts in ((True, [5, 3]), (False, None)):
        images = SampledImages(source, config.Config(), 8, balanced=balanced)
        found = np.bincount(images.labels()).tolist()
        assert sum(found) == 8 and (counts is None or found == counts)


@pytest.mark.parametrize("side", [2, 3, 4])
def test_quarters_are_means_of_the_map(side: int) -> None:
    """On an odd grid the middle patches belong to both halves."""
    map_BGG = torch.arange(2.0 * side * side).view(2, side, side)
    near, reach = -(-side // 2), side // 2
    halves = (slice(0, near), slice(reach, side))
    want_B4 = torch.stack([map_BGG[:, y, x].mean((1, 2)) for y in halves for x in halves], 1)
    cls_BC = torch.tensor([[7.0], [8.0]])
    outputs = Outputs(cls_BC, map_BGG.flatten(1)[..., None])
    model = Model("m", 1, frozenset({"cls", "patch"}), lambda *_: outputs, identity="known")
    made = summarised(model)
    rows = made.encode(torch.empty(2, 3, 1, 1), frozenset({"cls"})).cls_BC
    assert rows is not None and made.identity not in ("", model.identity)
    found = Quarters.of_rows(rows)
    assert torch.equal(found.cls_NMC[:, 0], cls_BC)
    assert torch.allclose(found.patch_NMC[..., 0], want_B4)
