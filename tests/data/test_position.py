"""A run's position is (seed, steps): any number of ranks continues with the remaining samples."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from pictures import folder

from unic_ds.config import Data
from unic_ds.data import Stream, pack, scan
from unic_ds.data.shards import MissingShard
from unic_ds.data.source import MAX_MB, Source

COUNT, BATCH, STEPS = 50, 24, 9  # the folder's epochs end in the third, fifth, seventh step
MICRO = {1: 24, 2: 6, 3: 4, 8: 3}  # images that a rank reads at a time, by the number of ranks
KINDS = ["folder", "shards", "mixture", "list"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The path of each kind of source; the shards contain other pictures, in several files."""
    root = tmp_path_factory.mktemp("places")
    images, more = folder(root / "images", COUNT), folder(root / "more", 70, classes=3)
    pack.pack(scan(more), root / "shards", pack.Settings(shard_mb=0.05), workers=2)
    names = [f"{name}\n" for name in reversed(scan(images).names)]
    (images / "list.txt").write_text("".join(names))
    given = {"folder": images, "shards": root / "shards", "list": images / "list.txt"}
    return given | {"mixture": f"{images}=0.5,{root / 'shards'}=1.3"}


def stream(place, *, world=1, rank=0, backend="torch", batch=BATCH):
    return Stream(
        place if isinstance(place, Source) else scan(place),
        Data(backend=backend, window=2),
        seed=3,
        sizes=(24,),
        batch_size=batch,
        micro=MICRO[world],
        rank=rank,
        world=world,
        device=torch.device("cpu"),
    )


def shown(place, *, world=1, first=0, steps=STEPS, backend="torch"):
    """{(step, position): (sample, pixels)} of the steps after `first` on `world` ranks."""
    rows = {}
    for rank in range(world):
        ours = stream(place, world=world, rank=rank, backend=backend)
        ours.seek(first)
        for k in range((steps - first) * BATCH // (MICRO[world] * world)):
            batch = next(ours)
            step = first + k * MICRO[world] * world // BATCH
            for b, position in enumerate(batch.position_B.tolist()):
                pixels = zlib.crc32(batch.images[24][b].numpy().tobytes())
                rows[step, position] = (int(batch.index_B[b]), pixels)
        ours.close()
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_what_remains_is_the_same_on_any_ranks(kind, places):
    straight = shown(places[kind])
    assert len(straight) == STEPS * BATCH
    assert len(set(straight.values())) == len(straight)  # a sample shown again is drawn anew
    for world in (1, 2, 3, 8):
        for first in (1, 4):
            rest = {place: row for place, row in straight.items() if place[0] >= first}
            assert shown(places[kind], world=world, first=first) == rest


def test_the_same_through_dali(places):
    pytest.importorskip("nvidia.dali", reason="nvidia-dali-cuda130 is not installed")
    straight = shown(places["mixture"], backend="dali", steps=6)
    rest = {place: row for place, row in straight.items() if place[0] >= 3}
    for world in (1, 3):
        assert shown(places["mixture"], world=world, first=3, steps=6, backend="dali") == rest


RANK = """
import json, sys, zlib
from test_position import MICRO, stream

ours = stream(sys.argv[1])
for step in range(10**6):
    batch = next(ours)
    rows = [[int(i), zlib.crc32(image.numpy().tobytes())]
            for i, image in zip(batch.index_B, batch.images[24])]
    print(json.dumps(rows), flush=True)
"""


@pytest.mark.parametrize("kind", ["shards", "mixture"])
def test_after_kill_9_other_ranks_show_the_rest(kind, places):
    """The samples of a killed process and of three ranks after it are those of one run."""
    straight = shown(places[kind])
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *sys.path, os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", RANK, str(places[kind])],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as killed:
        assert killed.stdout
        rows = (json.loads(line) for line in killed.stdout if line.startswith("["))
        lines = list(islice(rows, 5))
        killed.send_signal(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    before = {(s, b): tuple(row) for s, rows in enumerate(lines) for b, row in enumerate(rows)}
    assert before | shown(places[kind], world=3, first=5) == straight


def test_a_shard_that_goes_away_stops_the_stream_by_its_name(tmp_path):
    pack.pack(
        scan(folder(tmp_path / "images", 40)), tmp_path / "pack", pack.Settings(shard_mb=0.05)
    )
    ours = stream(tmp_path / "pack")
    (tmp_path / "pack" / "000001.tar").unlink()
    with pytest.raises(MissingShard, match=r"000001\.tar' was deleted during the run; restore it"):
        for _ in range(4):
            next(ours)
    ours.close()


@dataclass(frozen=True, eq=False)
class Slow(Source):
    """A source on a file system that reads one of its files slowly."""

    def read(self, index, max_mb=MAX_MB):
        if index == 7:
            time.sleep(1.5)
        return super().read(index, max_mb)


def test_a_file_system_that_is_slow_shows_as_waiting(places):
    images = scan(places["list"]).subset(range(BATCH))
    ours = stream(Slow(images.folder, images.names, images.classes, images.label_N))
    next(ours)
    assert ours.waited_s > 1.4
    ours.close()
