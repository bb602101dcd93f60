"""Probes against fp64 arithmetic and planted classes; table and picture against their files."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unic_ds import dist
from unic_ds.evaluate import table
from unic_ds.evaluate.features import extract, pixels
from unic_ds.evaluate.knn import knn
from unic_ds.evaluate.linear import linear

pytestmark = pytest.mark.filterwarnings("error")


class Rows(NamedTuple):
    train_NC: Tensor
    train_label_N: Tensor
    val_NC: Tensor
    val_label_N: Tensor


def planted(train: int, val: int, width: int, classes: int, gap: float, seed: int = 0) -> Rows:
    """Gaussian classes, centres `gap` standard deviations long, in channels of different scale."""
    g = torch.Generator().manual_seed(seed)
    label_N = torch.randint(classes, (train + val,), generator=g)
    centre = torch.randn(classes, width, generator=g) * gap / width**0.5
    x_NC = centre[label_N] + torch.randn(train + val, width, generator=g)
    x_NC = x_NC * torch.logspace(0, -3, width)
    return Rows(x_NC[:train], label_N[:train], x_NC[train:], label_N[train:])


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
    assert dict(knn(*rows, k=k, temperature=temperature)) == {"knn": pytest.approx(100 * hits / 60)}


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


RANK = """
import torch
from unic_ds import dist
dist.start()
rank = dist.rank()
mine = torch.arange(3 * rank * 2.0).view(-1, 2) + 100 * rank  # 0 and 3 rows
whole = dist.gather_rows(mine)
label = dist.gather_rows(torch.full((3 * rank,), rank))
truth = torch.cat([torch.arange(3 * r * 2.0).view(-1, 2) + 100 * r for r in range(2)])
assert torch.equal(whole, truth), whole
assert label.tolist() == [1] * 3, label
dist.stop()
"""


@pytest.mark.dist
def test_gather_rows_of_unequal_shares() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        where = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        where |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK], env=os.environ | where, stderr=subprocess.PIPE
            )
        )
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()


def test_gather_rows_alone_is_the_identity() -> None:
    rows_NC = torch.randn(5, 3)
    assert torch.equal(dist.gather_rows(rows_NC), rows_NC)
