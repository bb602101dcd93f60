"""Probes against fp64 arithmetic and planted classes; table and picture against their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from memory_sets import MemoryImages, scores_of
from pictures import folder
from planted_classes import planted
from runs import SUPPORT, TRAIN, run, tiny
from torch import Tensor

from unic_ds.config import Eval
from unic_ds.evaluate import registry
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.extraction import extract
from unic_ds.evaluate.features import Model, ModelOutput, Outputs, pixels

pytestmark = pytest.mark.filterwarnings("error")


def flat(image_B3HW: Tensor, _: object) -> Outputs:
    return Outputs(image_B3HW.flatten(1).to(torch.bfloat16))


def test_extract_keeps_the_order_of_the_images() -> None:
    image_N3HW = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    images = MemoryImages(image_N3HW, torch.tensor([3, -1, 0, 1, 1, 0, 2]))
    model = Model("flat", 8, frozenset({"cls"}), flat)
    found = extract([model], images)
    assert found.cls["flat"].dtype == torch.float32
    assert torch.equal(found.cls["flat"], image_N3HW.flatten(1).to(torch.bfloat16).float())
    assert found.place_R.tolist() == list(range(7))
    assert found.label_N.tolist() == images.label_N.tolist()
    labelled = found.labelled()
    assert labelled.label_R.tolist() == labelled.label_N.tolist() == [3, 0, 1, 1, 0, 2]
    assert torch.equal(labelled.cls["flat"][1], found.cls["flat"][2])
    with pytest.raises(RuntimeError, match="no images"):
        extract([model], MemoryImages(image_N3HW[:0], images.label_N[:0]))
    short = replace(model, encode=lambda image, _: Outputs(flat(image[:2], _).cls_BC))
    with pytest.raises(RuntimeError, match="2 rows of features for 7 images"):
        extract([short], images)


def test_models_are_evaluated_at_any_time() -> None:
    """By the evaluators asked for, with images read once, and no random number drawn."""
    seen: list[int] = []

    def encode(image_B3HW: Tensor, needs: frozenset[ModelOutput]) -> Outputs:
        assert needs == {"cls"}
        seen.append(len(image_B3HW))
        return flat(image_B3HW, needs)

    label_N = torch.arange(20) % 2
    image_N3HW = (label_N * 200).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    image_N3HW[:, 0, 0] = torch.arange(80).view(20, 4)
    images = MemoryImages(image_N3HW.to(torch.uint8), label_N)
    models = [Model("student", 4, frozenset({"cls"}), encode), Model("blind", 4, frozenset(), flat)]
    torch.manual_seed(3), np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    sets = {"train": images, "val": images}
    data = EvalData(sets, options=Eval(k=(3,)), seed=0, device=torch.device("cpu"))
    scores = registry.evaluate_models(models, data, ["knn", "linear"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert [score[:3] for score in scores] == [("student", "knn", 100), ("student", "linear", 100)]
    assert scores[0].protocol == "knn k=3 T=0.07 cosine 20/20 images 4 px"
    assert sum(seen) == 40
    (only,) = registry.evaluate_models(models, data, ["knn"])
    assert only == scores[0]
    with pytest.raises(ValueError, match="no evaluator 'dept'; choose from knn, linear"):
        registry.evaluate_models(models, data, ["dept"])


def test_an_evaluator_without_its_annotations_is_left_out(capsys: Any) -> None:
    images = MemoryImages(torch.zeros(4, 3, 4, 4), torch.zeros(4), annotations=frozenset())
    model = Model("m", 4, frozenset({"cls"}), flat)
    assert scores_of("knn", [model], {"train": images, "val": images}) == []
    assert "not evaluated by knn, which needs images with labels" in capsys.readouterr().out


def test_pixels() -> None:
    y, x = np.mgrid[:64, :64]
    image = torch.from_numpy(np.stack([x, y, x * 0 + 30]).astype(np.uint8))[None]
    pixel_BC = pixels(image)
    assert pixel_BC.shape == (1, 256) and pixel_BC.dtype == torch.float32
    boxes = image.float().mean(1).unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).flatten()
    # a ramp's antialiased value is its box mean, but at the border
    inside = (pixel_BC[0] * 127.5 + 127.5 - boxes).view(16, 16)[1:-1, 1:-1]
    assert inside.abs().max() < 0.05


@pytest.mark.dist
def test_any_number_of_ranks_finds_the_same_table(tmp_path: Path) -> None:
    """Shares of unequal length, images without a label, features that are NaN on one rank."""
    rows = planted(151, 86, 72, 5, gap=6)
    rows.train_label_N[7] = rows.val_label_N[-1] = -1
    found = []
    for ranks in (1, 2, 3):
        file = tmp_path / f"{ranks}.pt"
        torch.save(list(rows), file)
        run(Forked(ranks, [str(SUPPORT / "dealt_features.py"), str(file)]))
        first, *others = json.loads(file.with_suffix(".measured").read_text())
        assert others == [first] * (ranks - 1)
        found.append(first)
    (rows_of_one, sums, papers, failure), *more = found
    assert failure.startswith("features of 'middle' are NaN or infinite; leave the model out")
    assert list(rows_of_one) == ["narrow", "wide", "middle"]
    values = [value for row in rows_of_one.values() for value in row.values()]
    assert len(values) == 6 and all(50 < value <= 100 for value in values)
    assert len(papers) == 10 and all(50 < value <= 100 for value in papers[:3])
    for again, others, probes, same in more:
        assert (again, same) == (rows_of_one, failure)
        assert others == pytest.approx(sums, rel=1e-12)
        assert probes == pytest.approx(papers, rel=1e-3)


@pytest.mark.dist
def test_a_probe_that_fails_on_one_rank_ends_the_run_by_one_sentence(tmp_path: Path) -> None:
    for side in ("train", "val"):
        folder(tmp_path / side, 16)
    more = {"eval.max_train": 1, "optim.steps": 1}  # one image is of one class
    printed = run(Forked(2, [TRAIN, *tiny(tmp_path, "run", more)]), code=1)
    student = tmp_path / "run" / "student"
    says = f"the student is in {str(student)!r}, but it could not be evaluated; mend this and"
    assert printed.count(says) == 1 and "a linear probe wants training images" in printed
    assert (student / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "results.json").exists()
