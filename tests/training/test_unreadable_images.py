"""The names of images that could not be read, of a real stream over broken files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from pictures import folder

from unic_ds.config import Data
from unic_ds.data import Stream, scan
from unic_ds.training.run_log import RunLog
from unic_ds.training.unreadable_images import PER_RANK, UnreadableImages


def read_once(images: Path, count: int) -> Stream:
    """A stream that has read each image of a folder, and is closed."""
    found = Stream(
        scan(images),
        Data(backend="torch", bad_limit=1.0),
        seed=0,
        sizes=(32,),
        batch_size=count,
        micro=count,
        rank=0,
        world=1,
        device=torch.device("cpu"),
    )
    next(iter(found))
    found.close()
    return found


def test_all_are_named_line_by_line_though_their_number_stays(tmp_path: Path) -> None:
    images, out = folder(tmp_path / "images", 40), tmp_path / "run"
    out.mkdir()
    for path in sorted(images.rglob("*.jpg"))[: PER_RANK + 5]:
        path.write_bytes(b"")
    stream = read_once(images, 40)
    assert len(stream.bad) == PER_RANK + 5
    unreadable = UnreadableImages(out, stream)
    with RunLog(out, steps=4, first=1, batch_size=8, flops_per_image=1.0) as log:
        for step in (1, 2, 3):
            log.add({"loss": torch.tensor(0.5)})
            log.write(step, waited_s=0.0, bad=len(stream.bad), reason_K=torch.zeros(1))
            unreadable.record(log)
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [(row["step"], len(row["images"])) for row in rows] == [(1, PER_RANK), (2, 5)]
    assert len({image["name"] for row in rows for image in row["images"]}) == PER_RANK + 5


def test_events_that_cannot_be_written_end_no_run(tmp_path: Path) -> None:
    """The file is a folder."""
    (tmp_path / "events.jsonl").mkdir()
    images = folder(tmp_path / "images", 8)
    next(images.rglob("*.jpg")).write_bytes(b"")
    stream = read_once(images, 8)
    unreadable = UnreadableImages(tmp_path, stream)
    with RunLog(tmp_path, steps=1, first=1, batch_size=8, flops_per_image=1.0) as log:
        log.add({"loss": torch.tensor(0.5)})
        log.write(1, waited_s=0.0, bad=len(stream.bad), reason_K=torch.zeros(1))
        unreadable.record(log)
    assert len(unreadable.reasons) == 1
