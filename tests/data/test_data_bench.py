"""The data benchmark reports every loader; the index that it measures stays small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import folder

from unic_ds.config import Data
from unic_ds.data import backend, pack, scan

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.lengthy
@pytest.mark.slow
def test_it_measures_every_way_and_the_index(tmp_path):
    """On shards, which are one of the things that it may be given."""
    images = tmp_path / "pack"
    pack.pack(scan(folder(tmp_path / "images", 24)), images, pack.Settings(), workers=1)
    words = ["--size", "32", "--batch", "4", "--batches", "2", "--rounds", "2", "--threads", "1"]
    words += ["--readers", "1", "2", "--latency_ms", "20"]
    command = [sys.executable, "-m", "unic_ds.data.bench", *words]
    done = subprocess.run(
        [*command, "--images", str(images), "--json", str(tmp_path / "bench.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    result = json.loads((tmp_path / "bench.json").read_text())
    ways = {"torchvision, PIL", "torchvision, tensors", "torch decoder", "readers 1", "readers 2"}
    if backend(Data()) == "dali":
        ways |= {"DALI on the CPU", "DALI on the CPU, packed"}
    assert ways <= result["images_per_s"].keys()
    assert all(way in done.stdout for way in ways)
    assert all(speed > 0 for speed in result["images_per_s"].values())
    assert result["images"] == 24 and "torch decoder / torchvision" in result["ratios"]
    assert result["epoch_start_s"] < 1 and result["index_mb"] < 100
