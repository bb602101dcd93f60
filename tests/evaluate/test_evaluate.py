"""Probes against fp64 arithmetic and planted classes; table and picture against their files."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from forked import Forked
from pictures import folder
from PIL import Image
from planted_classes import Rows, planted
from runs import SUPPORT, TRAIN, run, tiny
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

from unic_ds import demo
from unic_ds.evaluate import table
from unic_ds.evaluate.features import extract, pixels
from unic_ds.evaluate.knn import knn
from unic_ds.evaluate.linear import ITERATIONS, STRENGTHS, accuracy, fit, linear, tensors_taken
from unic_ds.evaluate.rounds import attempt

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
    expected = {"knn": pytest.approx(100 * hits / 60)}
    assert dict(knn(*rows, k=k, temperature=temperature)) == expected
    small = dict(knn(*rows, k=k, temperature=temperature, block=1000))  # 6 rows, or 1, at a time
    assert small == expected


def test_equal_votes_go_to_the_smallest_label() -> None:
    train_NC = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    label_N, val_NC = torch.tensor([9, 4, 2]), torch.tensor([[2.0, 0.0]])
    assert dict(knn(train_NC, label_N, val_NC, torch.tensor([4]), k=2)) == {"knn": 100.0}
    assert dict(knn(train_NC, label_N, val_NC, torch.tensor([9]), k=2)) == {"knn": 0.0}


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


@pytest.mark.parametrize("strength", STRENGTHS)
def test_fit_is_the_fp64_solution_on_real_features(photographs: Rows, strength: float) -> None:
    """The weakest penalties stop at 100 iterations, as scikit-learn does in NumPy."""
    scaler = StandardScaler().fit(photographs.train_NC.double().numpy())
    train, val = (
        scaler.transform(x.double().numpy()) for x in (photographs.train_NC, photographs.val_NC)
    )
    labels = photographs.train_label_N.numpy()
    with tensors_taken():
        model = fit(photographs.train_NC, photographs.train_label_N, strength)
        value = accuracy(model, photographs.val_NC, photographs.val_label_N)
    with warnings.catch_warnings(action="ignore"):
        same = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(train, labels)
    points = 100 * same.score(val, photographs.val_label_N.numpy())
    assert abs(value - points) <= 0.2

    if model[-1].n_iter_ < ITERATIONS:
        best = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(train, labels)
        least = objective(best, train, labels, strength)
        assert abs(objective(model[-1], train, labels, strength) / least - 1) < 1e-4
    else:
        assert strength > 0.01


def objective(model: Any, x_NC: Any, labels: Any, strength: float) -> float:
    """The penalised loss that a logistic regression minimises, in fp64."""
    weight_LC, bias_L = (torch.as_tensor(w).double() for w in (model.coef_, model.intercept_))
    logit_NL = torch.from_numpy(x_NC) @ weight_LC.T + bias_L
    loss = cross_entropy(logit_NL, torch.from_numpy(labels), reduction="sum")
    return float(loss + weight_LC.square().sum() / (2 * strength))


@pytest.mark.parametrize("k", [1, 10, 200])
def test_knn_is_scikit_learn_s_on_real_features(photographs: Rows, k: int) -> None:
    train, train_label, val, val_label = (x.numpy() for x in photographs)
    model = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine")
    score = 100 * model.fit(train, train_label).score(val, val_label)
    assert dict(knn(*photographs, k=k)) == {"knn": pytest.approx(score, abs=1e-9)}


@pytest.mark.gpu
@pytest.mark.parametrize("classes", [2, 10])
def test_a_gpu_finds_the_accuracies_of_the_cpu(classes: int) -> None:
    rows = planted(2000, 1000, 256, classes, gap=4)
    on_gpu = [x.cuda() for x in rows]
    for evaluator in (knn, linear):
        (name, here), *_ = evaluator(*rows)
        found = list(evaluator(*on_gpu))
        assert found == [(name, pytest.approx(here, abs=0.1))]
        assert list(evaluator(*on_gpu)) == found


@pytest.mark.gpu
def test_probes_that_do_not_fit_the_gpu_name_the_remedy() -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        found = attempt("wide", planted(2000, 10, 2048, 3, gap=4), [knn], torch.device("cuda"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found == (
        {},
        "the probes of 'wide' need more than the GPU's memory for 2,000 training images x 2048"
        " features; lower --eval.max_train",
    )


def test_linear_finds_planted_classes() -> None:
    easy, none = planted(400, 200, 32, 4, gap=12), planted(400, 200, 32, 4, gap=0)
    assert dict(linear(*easy))["linear"] > 97
    assert 10 < dict(linear(*none))["linear"] < 40  # chance is 25


def test_linear_is_seeded_and_takes_awkward_sets() -> None:
    rows = planted(60, 40, 16, 3, gap=3)
    assert list(linear(*rows, seed=5)) == list(linear(*rows, seed=5))
    dead = rows.train_NC.clone()
    dead[:, 3] = 7.0  # a dead channel
    alone = rows.train_label_N.clone()
    alone[0] = 9  # a class of one image cannot be held out
    (_, value), *_ = linear(dead, alone, rows.val_NC, rows.val_label_N)
    assert value > 33
    two = Rows(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 1]))
    assert dict(linear(*two)) == {"linear": 100.0}
    with pytest.raises(ValueError, match="two classes"):
        list(
            linear(rows.train_NC, torch.zeros(60, dtype=torch.long), rows.val_NC, rows.val_label_N)
        )


def test_linear_in_seconds_at_the_quickstart_size() -> None:
    rows = planted(1968, 656, 1280, 4, gap=2)
    began = time.process_time()
    assert dict(linear(*rows))["linear"] > 30
    assert (
        time.process_time() - began < 60
    )  # CPU seconds of two threads; a quiet machine needs about 6


class Batch(NamedTuple):
    images: dict[int, Tensor]
    index_B: Tensor


def test_extract_keeps_the_order_of_the_batches() -> None:
    images = torch.randint(256, (7, 3, 8, 8), dtype=torch.uint8)
    batches = [Batch({8: part}, torch.arange(len(part))) for part in images.split(3)]

    def encode(sizes: dict[int, Tensor]) -> Tensor:
        return sizes[8].flatten(1).to(torch.bfloat16)

    features_NC = extract(encode, iter(batches))
    assert features_NC.dtype == torch.float32
    assert torch.equal(features_NC, images.flatten(1).to(torch.bfloat16).float())
    with pytest.raises(ValueError, match="no images"):
        extract(encode, [])
    with pytest.raises(ValueError, match="3 rows for 2 images"):
        extract(encode, [batches[0]._replace(index_B=torch.arange(2))])


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
    with Image.open(tmp_path / "results.png") as image:
        pixel = np.asarray(image.convert("RGB")).astype(int)
    assert pixel.shape[0] > 300 and pixel.shape[1] > 1000
    half = pixel.shape[1] * 2 // 5
    blue, orange = (31, 119, 180), (255, 127, 14)  # the first colours of matplotlib
    for part, colours in ((pixel[:, :half], [blue]), (pixel[:, half:], [blue, orange])):
        for colour in colours:
            assert (np.abs(part - colour).sum(-1) < 12).sum() > 100


def test_a_run_without_evaluation_has_results_too(tmp_path: Path) -> None:
    table.write({}, tmp_path, [])
    assert table.read(tmp_path / "results.json") == {}
    with Image.open(tmp_path / "results.png") as image:
        upright = (np.asarray(image.convert("L")) < 128).mean(0) > 0.5
    assert (np.diff(upright.astype(int)) == 1).sum() == 2  # the frame of the curve's axes alone


@pytest.mark.dist
def test_any_number_of_ranks_finds_the_same_table(tmp_path: Path) -> None:
    """Shares of unequal length, images without a label, a last round with fewer models."""
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
    (table, owners, failure), *more = found
    assert failure == "features of 'middle' are NaN or infinite; set --eval.on false"
    assert list(table) == ["narrow", "wide", "middle"]
    assert all(50 < row["linear"] <= 100 and 50 < row["knn"] <= 100 for row in table.values())
    assert [row.pop("rank") for row in owners.values()] == [0, 0, 0]
    for (again, shared, same), dealt in zip(more, ([0, 0, 1], [2, 0, 1]), strict=True):
        assert (again, same) == (table, failure)
        assert [row.pop("rank") for row in shared.values()] == dealt  # the widest first
        assert shared == owners


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
