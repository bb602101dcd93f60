"""The feature cache: what is stored is not computed again, also after a kill, on any ranks."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from memory_sets import MemoryImages
from pictures import folder
from runs import SUPPORT, kill_group, run, start
from torch import Tensor

from unic_ds.evaluate.extraction import extract
from unic_ds.evaluate.features import FILLER, Model, Outputs
from unic_ds.harness.feature_cache import FeatureCache


class Counted(MemoryImages):
    """Images in memory of which some cannot be read."""

    broken = ()

    def batches(self, sizes: Any, only: Any = None) -> Any:
        for batch in super().batches(sizes, only):
            readable_B = ~np.isin(batch.place_B, self.broken)
            yield batch._replace(place_B=np.where(readable_B, batch.place_B, FILLER))


def images_of(broken: tuple[int, ...] = (), identity: str = "these") -> Counted:
    value_NC = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    images = Counted(value_NC, torch.arange(40) % 3, identity=identity)
    images.broken = broken
    return images


def model_of(name: str, identity: str, seen: list[int]) -> Model:
    def encode(row_BC: Tensor, _: object) -> Outputs:
        if row_BC.ndim == 2:  # a black image asks for the width
            seen.append(len(row_BC))
            return Outputs(row_BC.clone())
        return Outputs(torch.zeros(len(row_BC), 6))

    return Model(name, 1, frozenset({"cls"}), encode, identity=identity)


def test_features_are_computed_once(tmp_path: Path, capsys: Any) -> None:
    seen: list[int] = []
    model, cache = model_of("a", "weights a", seen), FeatureCache(tmp_path)
    plain = extract([model], images_of())
    seen.clear()
    first = extract([model], images_of(), cache)
    assert sum(seen) == 40
    assert (
        "features of 1 models on 40 images of memory to be cached: 0.0 MB" in capsys.readouterr()[0]
    )
    again = extract([model], images_of(), cache)
    assert sum(seen) == 40
    for found in (first, again):
        assert torch.equal(found.cls["a"], plain.cls["a"])
        assert torch.equal(found.place_R, plain.place_R)
        assert torch.equal(found.label_N, plain.label_N)
    # another model beside it, other weights, other images: computed
    other = model_of("b", "weights b", seen)
    both = extract([model, other], images_of(), cache)
    assert sum(seen) == 80 and torch.equal(both.cls["b"], plain.cls["a"])
    extract([model_of("a", "new weights", seen)], images_of(), cache)
    extract([model], images_of(identity="those"), cache)
    assert sum(seen) == 160
    unknown = model_of("c", "", seen)  # without an identity: never stored
    for _ in range(2):
        mixed = extract([unknown, model], images_of(), cache)
    assert sum(seen) == 240 and list(mixed.cls) == ["c", "a"]


def test_an_unreadable_image_is_left_out_of_all_models(tmp_path: Path, capsys: Any) -> None:
    seen: list[int] = []
    stored, cache = model_of("a", "weights a", seen), FeatureCache(tmp_path)
    extract([stored], images_of(), cache)
    capsys.readouterr()
    fresh = model_of("b", "weights b", seen)
    for _ in range(2):  # tried again each time
        found = extract([stored, fresh], images_of(broken=(3, 17)), cache)
        assert found.place_R.tolist() == [i for i in range(40) if i not in (3, 17)]
        assert found.label_N[[3, 17]].tolist() == [-1, -1]
        assert torch.equal(found.cls["a"], found.cls["b"])
    says = "2 of 40 images of memory cannot be read and are left out of all models: 3.png, 17.png"
    assert capsys.readouterr().out.count(says) == 2
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 3  # of both models, and the two places
    again = extract([stored, fresh], images_of(), cache)  # they can be read now
    assert len(again.place_R) == 40 and "cannot be read" not in capsys.readouterr().out


def test_damage_is_repaired_and_foreign_parts_are_refused(tmp_path: Path, capsys: Any) -> None:
    seen: list[int] = []
    model, cache = model_of("a", "weights a", seen), FeatureCache(tmp_path)
    want = extract([model], images_of(), cache)
    (part,) = tmp_path.glob("*/*.safetensors")
    part.write_bytes(part.read_bytes()[:50])
    again = extract([model], images_of(), cache)
    assert torch.equal(again.cls["a"], want.cls["a"]) and sum(seen) == 80
    assert "its features are computed again" in capsys.readouterr().out
    part.unlink()
    few = MemoryImages(torch.zeros(5, 6), torch.zeros(5), identity="these")
    with pytest.raises(RuntimeError, match="holds features of other images; delete it"):
        extract([model], few, cache)


def test_a_cache_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match=r"give --eval\.cache another folder, or none"):
        FeatureCache(tmp_path).check_room(2 * size)


@pytest.mark.dist
def test_a_killed_extraction_goes_on_with_other_ranks(tmp_path: Path) -> None:
    """Two ranks are killed while they encode; one rank goes on; the features are those of one."""
    folder(tmp_path / "images", 24)
    (tmp_path / "images" / "class_0" / "004.jpg").write_bytes(b"broken")
    script = str(SUPPORT / "cached_features.py")
    process = start(Forked(2, [script, str(tmp_path), "0.5"]))
    last = time.monotonic() + 120
    while len(list((tmp_path / "cache").glob("*/*.safetensors"))) < 3:
        assert process.poll() is None and time.monotonic() < last
        time.sleep(0.05)
    kill_group(process)
    assert not (tmp_path / "found").exists()
    stored = len(list((tmp_path / "cache").glob("*/*.safetensors")))
    (tmp_path / "encoded").write_text("")
    run(Forked(1, [script, str(tmp_path)]))
    resumed = (tmp_path / "found").read_text()
    assert sum(map(int, (tmp_path / "encoded").read_text().split())) <= 24 - 2 * (stored - 1) + 1
    shutil.rmtree(tmp_path / "cache")
    run(Forked(2, [script, str(tmp_path)]))
    assert (tmp_path / "found").read_text() == resumed and resumed.startswith("23 ")
