"""Probes against fp64 arithmetic and planted classes; table and picture against their files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from forked import Forked
from pictures import folder
from PIL import Image
from planted_classes import Rows, knn, linear, planted
from runs import SUPPORT, TRAIN, run, tiny
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

from unic_ds import demo
from unic_ds.config import Eval
from unic_ds.evaluate import linear as probe
from unic_ds.evaluate import registry, table
from unic_ds.evaluate.features import (
    FILLER,
    Annotation,
    EvalBatch,
    Model,
    ModelOutput,
    Outputs,
    deal,
    extract,
    pixels,
)
from unic_ds.evaluate.linear import STRENGTHS

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    "k, temperature", [(1, 0.07), (10, 0.07), (20, 1.0), (10, 0.001), (1000, 0.07)]
)
def test_knn_is_the_weighted_vote(k: int, temperature: float) -> None:
    rows = planted(150, 60, 24, 5, gap=2.5)
    train, val = (x.double().numpy() for x in (rows.train_NC, rows.val_NC))
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    val /= np.linalg.norm(val, axis=1, keepdims=True)
    hits = 0
    for row, label in zip(val, rows.val_label_N.tolist(), strict=True):
        cosine = train @ row
        votes = np.zeros(5)
        for i in np.argsort(-cosine)[:k]:
            votes[rows.train_label_N[i]] += np.exp((cosine[i] - 1) / temperature)
        hits += int(votes.argmax() == label)
    expected = pytest.approx(100 * hits / 60)
    assert knn(rows, k, temperature) == expected
    assert knn(rows, k, temperature, block=1000) == expected  # 6 queries, or 1, at a time
    assert knn(rows, k, temperature, block=64) == expected  # the bank in three blocks


def test_equal_votes_go_to_the_smallest_label() -> None:
    train_NC = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    label_N, val_NC = torch.tensor([9, 4, 2]), torch.tensor([[2.0, 0.0]])
    assert knn(Rows(train_NC, label_N, val_NC, torch.tensor([4])), k=2) == 100
    assert knn(Rows(train_NC, label_N, val_NC, torch.tensor([9])), k=2) == 0


@pytest.fixture(scope="module")
def photographs(demonstration: None) -> Rows:
    """Thumbnails and classes of the demonstration's images: 1600 to train on, 1024 unseen."""
    files = sorted((demo.root() / "images").glob("*/*.jpg"))
    classes = sorted({file.parent.name for file in files})
    image_N1HW = torch.stack([thumbnail(file) for file in files])
    value_NC = pixels(image_N1HW)
    label_N = torch.tensor([classes.index(file.parent.name) for file in files])
    order_N = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    train, val = order_N.split([1600, len(files) - 1600])
    return Rows(value_NC[train], label_N[train], value_NC[val], label_N[val])


def thumbnail(file: Path) -> Tensor:
    """A photograph in grey, 64 x 64."""
    with Image.open(file) as image:
        image.draft("L", (80, 80))
        return torch.from_numpy(np.array(image.convert("L").resize((64, 64))))[None]


@pytest.mark.parametrize("classes", [2, 4])
def test_fits_are_the_fp64_solutions_on_real_features(photographs: Rows, classes: int) -> None:
    """All strengths at once, beside scikit-learn's, each for as long as it takes."""
    train, val = (
        probe.Split(x_NC[label_N < classes], label_N[label_N < classes])
        for x_NC, label_N in (photographs[:2], photographs[2:])
    )
    train, val = probe.standardised(train, val, torch.device("cpu"), "pixels")
    x_NC, held_NC = (split.x_RD[:, :-1].double() for split in (train, val))
    scaler = StandardScaler().fit(
        photographs.train_NC[photographs.train_label_N < classes].double()
    )
    assert np.allclose(
        x_NC[:9],
        scaler.transform(photographs.train_NC[photographs.train_label_N < classes][:9]),
        atol=1e-5,
    )
    weights = probe.fit([train], [STRENGTHS], classes)
    points = probe.accuracies([val], weights, classes)
    for strength, weight_DL, value in zip(
        STRENGTHS, weights[0].view(-1, x_NC.shape[1] + 1, classes).double(), points[0], strict=True
    ):
        best = LogisticRegression(C=strength, max_iter=20_000, tol=1e-8).fit(x_NC, train.class_R)
        assert value == pytest.approx(100 * best.score(held_NC, val.class_R), abs=0.1 + 1e-9)
        coef_LC, bias_L = (torch.from_numpy(w) for w in (best.coef_, best.intercept_))
        if classes == 2:
            coef_LC, bias_L = (torch.cat([-w / 2, w / 2]) for w in (coef_LC, bias_L))
        least = objective(coef_LC, bias_L, x_NC, train.class_R, strength)
        found = objective(weight_DL[:-1].T, weight_DL[-1], x_NC, train.class_R, strength)
        assert found / least - 1 < 1e-5


def objective(
    coef_LC: Tensor, bias_L: Tensor, x_NC: Tensor, class_N: Tensor, strength: float
) -> float:
    """The penalised loss that a logistic regression minimises, in fp64."""
    loss = cross_entropy(x_NC @ coef_LC.T + bias_L, class_N, reduction="sum")
    both = 2 if len(bias_L) == 2 else 1  # two classes have one weight vector
    return float(loss + both * coef_LC.square().sum() / (2 * strength))


@pytest.mark.parametrize("k", [1, 10, 200])
def test_knn_is_scikit_learn_s_on_real_features(photographs: Rows, k: int) -> None:
    train, train_label, val, val_label = (x.numpy() for x in photographs)
    model = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine")
    score = 100 * model.fit(train, train_label).score(val, val_label)
    assert knn(photographs, k=k) == pytest.approx(score, abs=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [2, 10])
def test_a_gpu_finds_the_accuracies_of_the_cpu(classes: int) -> None:
    rows = planted(2000, 1000, 256, classes, gap=4)
    on_gpu = Rows(*(x.cuda() for x in rows))
    assert knn(on_gpu) == knn(on_gpu) == pytest.approx(knn(rows), abs=0.1)
    assert linear(rows, device="cuda") == linear(rows, device="cuda")
    assert linear(rows, device="cuda") == pytest.approx(linear(rows), abs=0.1)


@pytest.mark.gpu
def test_probes_that_do_not_fit_the_gpu_name_the_remedy() -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    says = "out of GPU memory in the linear probe of 'm'; lower --eval.max_train"
    try:
        with pytest.raises(RuntimeError, match=says):
            linear(planted(2000, 10, 2048, 3, gap=4), device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_linear_finds_planted_classes() -> None:
    assert linear(planted(400, 200, 32, 4, gap=12)) > 97
    assert 10 < linear(planted(400, 200, 32, 4, gap=0)) < 40  # chance is 25


def test_linear_is_seeded_and_takes_awkward_sets() -> None:
    rows = planted(60, 40, 16, 3, gap=3)
    assert linear(rows, seed=5) == linear(rows, seed=5)
    dead = rows.train_NC.clone()
    dead[:, 3] = 7.1  # a dead channel
    alone = rows.train_label_N.clone()
    alone[0] = 9  # a class of one image cannot be held out
    assert linear(rows._replace(train_NC=dead, train_label_N=alone)) > 33
    two = Rows(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 1]))
    assert linear(two) == 100
    with pytest.raises(ValueError, match="two classes"):
        linear(rows._replace(train_label_N=torch.zeros(60, dtype=torch.long)))


def test_linear_in_seconds_at_the_quickstart_size() -> None:
    rows = planted(1968, 656, 1280, 4, gap=2)
    began = time.process_time()
    assert linear(rows) > 30
    assert time.process_time() - began < 60  # CPU seconds; a quiet machine needs about 1


class Images(NamedTuple):
    """An image set in memory, in batches of 3 (`features.ImageSet`)."""

    image_N3HW: Tensor
    label_N: Tensor
    annotations: frozenset[Annotation] = frozenset({"labels"})

    def __len__(self) -> int:
        return len(self.label_N)

    def batches(self, sizes: Sequence[int]) -> Iterator[EvalBatch]:
        place_R, counted_R = deal(len(self))
        place_R[~counted_R] = FILLER
        for place_B in (place_R[at : at + 3] for at in range(0, len(place_R), 3)):
            images = dict.fromkeys(sizes, self.image_N3HW[place_B])
            yield EvalBatch(images, place_B, {"labels": self.label_N[place_B]})


def flat(image_B3HW: Tensor, _: object) -> Outputs:
    return Outputs(image_B3HW.flatten(1).to(torch.bfloat16))


def test_extract_keeps_the_order_of_the_images() -> None:
    image_N3HW = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    images = Images(image_N3HW, torch.tensor([3, -1, 0, 1, 1, 0, 2]))
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
        extract([model], Images(image_N3HW[:0], images.label_N[:0]))
    short = replace(model, encode=lambda image, _: Outputs(flat(image[:2], _).cls_BC))
    with pytest.raises(RuntimeError, match="2 rows of features for 3 images"):
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
    images = Images(image_N3HW.to(torch.uint8), label_N)
    models = [Model("student", 4, frozenset({"cls"}), encode), Model("blind", 4, frozenset(), flat)]
    torch.manual_seed(3), np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    more = {"options": Eval(k=3), "seed": 0, "device": torch.device("cpu")}
    scores = registry.evaluate_models(models, images, images, **more)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert [score[:3] for score in scores] == [("student", "knn", 100), ("student", "linear", 100)]
    assert scores[0].protocol == "knn k=3 T=0.07 cosine 20/20 images 4 px"
    assert sum(seen) == 40
    (only,) = registry.evaluate_models(models, images, images, names=["knn"], **more)
    assert only == scores[0]
    with pytest.raises(ValueError, match="no evaluator 'depth'; choose from knn, linear"):
        registry.evaluate_models(models, images, images, names=["depth"], **more)


def test_an_evaluator_without_its_annotations_is_left_out(capsys: Any) -> None:
    images = Images(torch.zeros(4, 3, 4, 4), torch.zeros(4), annotations=frozenset())
    found = registry.evaluate_models(
        [Model("m", 4, frozenset({"cls"}), flat)],
        images,
        images,
        options=Eval(),
        seed=0,
        device=torch.device("cpu"),
        names=["knn"],
    )
    assert found == []
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


ROWS = {
    "16x16 pixels": {"knn": 71.5, "linear": 74.25},
    "teacher effnet": {"knn": 82.8},
    "student": {"knn": 82.0, "linear": 80.0},
}


def test_table_says_every_number(tmp_path: Path) -> None:
    text = table.render(ROWS)
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert list(lines) == list(ROWS)
    assert "71.5" in lines["16x16 pixels"] and "74.2" in lines["16x16 pixels"]
    assert "82.8" in lines["teacher effnet"] and " - " in lines["teacher effnet"]
    assert "\x1b" not in text


def test_results_are_written_and_drawn(tmp_path: Path) -> None:
    log = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.5}, {"note": "saved"}]
    table.write(ROWS, tmp_path, log)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.png"]
    assert table.read(tmp_path / "results.json") == ROWS
    assert table.read_protocols(tmp_path) == {}
    with Image.open(tmp_path / "results.png") as image:
        pixel = np.asarray(image.convert("RGB")).astype(int)
    assert pixel.shape[0] > 300 and pixel.shape[1] > 1000
    half = pixel.shape[1] * 2 // 5
    blue, orange = (31, 119, 180), (255, 127, 14)  # the first colours of matplotlib
    for part, colours in ((pixel[:, :half], [blue]), (pixel[:, half:], [blue, orange])):
        for colour in colours:
            assert (np.abs(part - colour).sum(-1) < 12).sum() > 100


def test_every_number_has_its_protocol(tmp_path: Path) -> None:
    scores = [
        table.Score("pixels", "knn", 70.0, "knn k=10 112 px"),
        table.Score("dino", "knn", 80.0, "knn k=10 98 px"),
        table.Score("pixels", "linear", 71.0, "linear 112 px"),
        table.Score("student", "knn", 75.0, "knn k=10 112 px"),
    ]
    rows, protocols = table.tabulate(scores)
    assert rows == {"pixels": {"knn": 70.0, "linear": 71.0}, "dino": {"knn": 80.0}} | {
        "student": {"knn": 75.0}
    }
    table.write(rows, tmp_path, [], protocols)
    assert table.read(tmp_path / "results.json") == rows
    assert table.read_protocols(tmp_path) == protocols
    lines = table.render(rows, protocols).splitlines()[-3:]
    assert lines == ["knn k=10 112 px: pixels, student", "knn k=10 98 px: dino", "linear 112 px"]


def test_a_run_without_evaluation_has_results_too(tmp_path: Path) -> None:
    table.write({}, tmp_path, [])
    assert table.read(tmp_path / "results.json") == {}
    with Image.open(tmp_path / "results.png") as image:
        upright = (np.asarray(image.convert("L")) < 128).mean(0) > 0.5
    assert (np.diff(upright.astype(int)) == 1).sum() == 2  # the frame of the curve's axes alone


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
    (rows_of_one, sums, failure), *more = found
    assert failure == "features of 'middle' are NaN or infinite; set --eval.on false"
    assert list(rows_of_one) == ["narrow", "wide", "middle"]
    values = [value for row in rows_of_one.values() for value in row.values()]
    assert len(values) == 6 and all(50 < value <= 100 for value in values)
    for again, others, same in more:
        assert (again, same) == (rows_of_one, failure)
        assert others == pytest.approx(sums, rel=1e-12)


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
