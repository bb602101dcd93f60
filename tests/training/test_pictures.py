"""Pictures that a run makes by itself: which there are, what they show, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from host_reads import HostReads
from numpy.typing import NDArray
from pictures import encode, folder, photo
from PIL import Image
from runs import TRAIN, run, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from unic_ds import config
from unic_ds.data import Batch
from unic_ds.evaluate.pca_maps import Basis
from unic_ds.files import tensor_files
from unic_ds.training import picture_folder, pictures
from unic_ds.training.first_images import FirstImages
from unic_ds.training.picture_folder import PictureFolder

PICTURES = {(2, "pca"), (2, "neighbours"), (4, "pca"), (4, "neighbours"), (1, "augmented")}
"""Step and kind of those of the run `finished`."""


def listed(out: Path) -> list[dict[str, Any]]:
    """The rows of a run's pictures.json."""
    rows: list[dict[str, Any]] = json.loads((out / "pictures" / "pictures.json").read_text())
    return rows


def pixels(out: Path, row: dict[str, Any]) -> NDArray[np.uint8]:
    with Image.open(out / "pictures" / row["file"]) as image:
        return np.asarray(image.convert("RGB"))


def test_a_run_draws_at_each_probe_and_at_its_end(finished: tuple[Path, str]) -> None:
    out, printed = finished
    rows = listed(out)
    assert {(row["step"], row["kind"]) for row in rows} == PICTURES and len(rows) == len(PICTURES)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    files = {path.name for path in (out / "pictures").iterdir()}
    assert files == {"pictures.json", "pca.safetensors", *(row["file"] for row in rows)}
    for row in rows:
        assert row.keys() == {"file", "kind", "step", "title", "caption", "model"}
        assert (out / "pictures" / row["file"]).stat().st_size < 400_000
        assert pixels(out, row).std() > 10
    assert "a picture is missing" not in printed


def test_captions_say_how_pictures_were_made(finished: tuple[Path, str]) -> None:
    out, _ = finished
    captions = {(row["step"], row["kind"]): row["caption"] for row in listed(out)}
    pca, near = captions[4, "pca"], captions[4, "neighbours"]
    assert "centred by their mean" in pca and "1st to the 99th percentile" in pca
    for name in ("effnet", "dinov2", "student"):
        assert f"{name} 4 images, 16 tokens" in pca  # a grid of 2 x 2
    assert "of 160 training images" in near  # the table's, which has more than the probe
    assert "of 40 training images" in captions[2, "neighbours"]
    assert "--data.augment weak, at the student's 32 px" in captions[1, "augmented"]


def test_a_teacher_keeps_its_basis_and_colours(finished: tuple[Path, str]) -> None:
    """Rows are: images, effnet, student as effnet, dinov2, student as dinov2, student."""
    out, _ = finished
    early, late = (
        pixels(out, row)
        for row in sorted(listed(out), key=lambda r: r["step"])
        if row["kind"] == "pca"
    )
    same_R = [
        bool((early[at : at + pictures.SIDE] == late[at : at + pictures.SIDE]).all())
        for at in range(41, 41 + 6 * 122, 122)
    ]
    assert same_R == [True, True, False, True, False, False]
    state = tensor_files.read(out / "pictures" / "pca.safetensors")
    widths = {"effnet": 1280, "dinov2": 384, "student": 192}
    assert all(Basis.read(state, f"{name}/", width=width) for name, width in widths.items())


def test_trackers_have_the_pictures(finished: tuple[Path, str]) -> None:
    out, _ = finished
    events = EventAccumulator(str(out / "tb")).Reload()
    steps = {(e.step, tag) for tag in events.Tags()["images"] for e in events.Images(tag)}
    assert steps == {(step, f"pictures/{kind}") for step, kind in PICTURES}


def test_broken_images_are_named_and_a_picture_that_fails_ends_no_run(tmp_path: Path) -> None:
    """No validation images and no classes: training images are shown, without neighbours."""
    images = folder(tmp_path / "train", 24, classes=1) / "class_0"
    odd = images / "cut\x1b.jpg"
    odd.write_bytes(encode(photo()).tobytes()[:-20])
    (tmp_path / "val").mkdir()
    more = {"data.val": "", "probe.pictures": 3, "optim.steps": 4, "run.save_every": 0}
    out = tmp_path / "run"
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "pictures.json").mkdir()  # cannot be replaced by a file
    (out / "results.png").mkdir()
    printed = run(Forked(1, [TRAIN, *tiny(tmp_path, "run", {**more, "data.bad_limit": 0.2})]))
    said = "a picture is missing, which ends no run: "
    assert printed.count(said) == 2  # during training, and after it
    assert printed.count("a part of the finished run is missing: ") == 1
    assert "finished; student in" in printed and (out / "results.json").is_file()
    rows = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    (event,) = (row for row in rows if row["event"] == "unreadable")
    assert event["count"] == 1
    assert event["images"] == [{"name": "class_0/cut\\x1b.jpg", "reason": "is cut off"}]
    board = EventAccumulator(str(out / "tb")).Reload()
    (tag,) = board.Tags()["tensors"]
    (text,) = board.Tensors(tag)[0].tensor_proto.string_val
    assert text.decode() == r"<pre>- class_0/cut\x1b.jpg: is cut off</pre>"


def test_models_that_are_not_shown_are_named() -> None:
    said = pictures.caption_of_pca({}, absent=["dinov2"], broken=["student"])
    assert "come from a cache: dinov2." in said and "NaN or infinite: student." in said


def written(out: Path, *steps: int) -> PictureFolder:
    kept = PictureFolder(out)
    for step in steps:
        image = np.full((8, 8, 3), step % 256, dtype=np.uint8)
        kept.add("pca", image, step=step, title="t", caption="c")
    return kept


def test_a_start_drops_the_pictures_of_later_steps(tmp_path: Path) -> None:
    kept = written(tmp_path, 2, 4, 6, 4)
    assert [entry.step for entry in kept.entries()] == [2, 4, 6]
    kept.store_bases({"a/mean_C": torch.zeros(2)})
    kept.drop_after(4)
    assert kept.bases().keys() == {"a/mean_C"}
    assert [entry.step for entry in kept.entries()] == [2, 4]
    names = {path.name for path in kept.path.iterdir()} - {"pca.safetensors"}
    assert names == {"pictures.json", "pca_step_0000002.png", "pca_step_0000004.png"}
    kept.drop_after(0)
    assert kept.entries() == [] and not kept.has("pca") and not kept.bases()
    (kept.path / "pca.safetensors").write_bytes(b"no tensors")
    assert not kept.bases()


def test_a_long_run_keeps_fewer_of_its_early_pictures(tmp_path: Path) -> None:
    steps = [entry.step for entry in written(tmp_path, *range(1, 151)).entries()]
    assert len(steps) <= picture_folder.KEPT and steps[-1] == 150
    assert len(list((tmp_path / "pictures").glob("*.png"))) == len(steps)
    assert steps[0] < 10 and max(np.diff(steps)) < 20


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[1, null]", '[{"file": "../../x", "step": 1}]', "[" * 99]
)
def test_a_list_of_pictures_that_is_broken_is_begun_anew(tmp_path: Path, text: str) -> None:
    kept = written(tmp_path, 3)
    (kept.path / "pictures.json").write_text(text)
    assert kept.entries() == []
    written(tmp_path, 4)
    assert [row["step"] for row in listed(tmp_path)] == [4]


def test_entries_of_files_elsewhere_are_not_read(tmp_path: Path) -> None:
    kept, outside = written(tmp_path, 3), tmp_path / "other.png"
    outside.write_bytes(b"x")
    rows = listed(tmp_path)
    rows.append(rows[0] | {"file": "../other.png", "step": 9})
    (kept.path / "pictures.json").write_text(json.dumps(rows))
    kept.drop_after(5)
    assert outside.exists() and [entry.step for entry in kept.entries()] == [3]


def test_the_first_batch_is_kept_and_none_is_lost() -> None:
    batches = [
        Batch({4: torch.full((3, 3, 4, 4), n + 1, dtype=torch.uint8)}, np.arange(3), np.arange(3))
        for n in range(4)
    ]
    first = FirstImages(iter(batches), count=2, images_of=lambda batch: batch.images[4])
    assert first.take() is None
    for batch in batches:
        with HostReads({}) as reads:
            found = next(first)
        assert found is batch and not reads.reads  # the host waits for nothing
        found.images[4].zero_()  # a decoder's buffer is used again
    taken = first.take()
    assert taken is not None and taken.shape == (2, 3, 4, 4) and (taken == 1).all()
    assert first.take() is None


def test_the_number_of_pictures_is_checked() -> None:
    for count in (-1, 33):
        with pytest.raises(ValueError, match=r"probe\.pictures"):
            config.Config(probe=config.Probe(pictures=count))
