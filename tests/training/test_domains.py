"""Teachers that see some sources of a mixture alone, and kinds of token per source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import folder
from runs import TINY, curve, run, statistics, tiny_spread, together

from unic_ds.config import job
from unic_ds.data import scan

STEPS = 6
DOMAINS = {
    "teachers.wide.data": "photos",
    "balance.kind": "none",
    "standardise.fit_steps": 2,
    "optim.steps": STEPS,
    "optim.lr": "1e-2",
    "eval.on": "false",
    "run.save_every": STEPS,
}
LAZY = {
    "balance.kind": "dropping",
    "drop.lazy": "true",
    "drop.full_every": 3,
    "loss.divisor": "expected",
    "loss.tokens": "drawings=patch",
    "standardise.fit_steps": 0,
}
KINDS = {
    "teachers.wide.data": "",
    "loss.tokens": "photos=cls,drawings=patch",
    "loss.cls": "cosine",
    "loss.patch": "cosine",
    "ladder.combine": "each",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of images, of which an epoch uses the second's half as often."""
    root = tmp_path_factory.mktemp("domains")
    folder(root / "photos", 16)
    folder(root / "drawings", 16)
    return root


def words(images: Path, out: str, *, micro: int, stage: int, **more: Any) -> list[str]:
    """The command line of a run."""
    given = DOMAINS | {"data.train": mixture(images), "data.val": ""} | more
    return tiny_spread(images, out, given, micro=micro, stage=stage)


def mixture(images: Path) -> str:
    """The value of --data.train."""
    return f"{images}/photos,{images}/drawings=0.5"


@pytest.fixture(scope="module")
def curves(images: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The curves of all runs: a launch of one rank, and one of two."""
    shard = {f"teachers.{name}.placement": "shard" for name in ("narrow", "wide")}
    launches = {
        1: {
            "whole": words(images, "whole", micro=8, stage=1),
            "lazy": words(images, "lazy", micro=8, stage=1, **LAZY),
            "kinds": words(images, "kinds", micro=8, stage=1, **KINDS),
        },
        2: {
            "split": words(images, "split", micro=2, stage=3, **shard),
            "lazy split": words(images, "lazy split", micro=2, stage=2, **LAZY),
            "kinds split": words(images, "kinds split", micro=2, stage=3, **KINDS, **shard),
        },
    }
    for ranks, runs in launches.items():
        plan = images / f"plan{ranks}.json"
        plan.write_text(json.dumps(list(runs.values())))
        run(together(plan, ranks))
    return {name: curve(images / name) for runs in launches.values() for name in runs}


@pytest.mark.dist
def test_a_teacher_counts_on_its_images_alone(
    images: Path, curves: dict[str, dict[int, dict[str, Any]]]
) -> None:
    whole = curves["whole"]
    assert all(row["narrow/kept"] == 1 for row in whole.values())
    photos = [row["wide/kept"] for row in whole.values()]
    assert 0 < min(photos) < max(photos) <= 1
    # Two epochs of 16 photographs and 8 drawings.
    assert np.mean(photos) == pytest.approx(2 / 3)
    assert all(row["wide/weight"] == pytest.approx(row["wide/kept"] / 2) for row in whole.values())


@pytest.mark.dist
def test_ranks_do_not_change_it(images: Path, curves: dict[str, dict[int, dict[str, Any]]]) -> None:
    """Neither the losses nor the statistics, which are those of a teacher's own images."""
    for one in ("whole", "lazy", "kinds"):
        other = {"whole": "split"}.get(one, f"{one} split")
        for step, row in curves[one].items():
            for name in ("loss", "wide/kept", "narrow/kept"):
                assert curves[other][step][name] == pytest.approx(row[name], rel=1e-5), (one, step)
        saved = [
            statistics(images / out / "checkpoints" / f"step_{STEPS:07d}") for out in (one, other)
        ]
        for name, value in saved[0].items():
            assert value.numpy() == pytest.approx(saved[1][name].numpy(), rel=1e-4, abs=1e-5), name


@pytest.mark.dist
def test_with_lazy_dropping_a_teacher_is_chosen_for_its_images_alone(
    curves: dict[str, dict[int, dict[str, Any]]],
) -> None:
    for step, row in curves["lazy"].items():
        assert row["wide/kept"] <= curves["whole"][step]["wide/kept"]
        assert row["wide/kept"] + row["narrow/kept"] >= 1
    assert any(row["narrow/kept"] < 1 for row in curves["lazy"].values())


@pytest.mark.dist
def test_images_of_a_source_have_the_loss_of_their_kind_of_token(
    curves: dict[str, dict[int, dict[str, Any]]],
) -> None:
    """Photographs that of CLS tokens, drawings that of patch tokens; all logged distances count."""
    for step, row in curves["kinds"].items():
        photos = curves["whole"][step]["wide/kept"]  # in the same order
        kinds = [("cls", photos), ("patch", 1 - photos)]
        want = [
            share * (1 - row[f"{name}/{kind}_cosine"])
            for name in ("narrow", "wide")
            for kind, share in kinds
            if share
        ]
        assert row["loss"] == pytest.approx(sum(want) / 2, rel=1e-5)
        assert ("narrow/cls_cosine" in row) == (photos > 0)
        assert row["narrow/kept"] == row["wide/kept"] == 1


def test_parts_of_a_mixture_are_found_by_index(images: Path) -> None:
    source = scan(mixture(images))
    assert source.part_names == (f"{images}/photos", f"{images}/drawings")
    assert source.part_of(np.array([0, 15, 16, 31])).tolist() == [0, 0, 1, 1]
    drawings = source.subset(np.arange(20, 32))
    assert drawings.part_names == (f"{images}/drawings",)
    assert drawings.part_of(np.array([0, 11])).tolist() == [0, 0]
    alone = scan(images / "photos")
    assert alone.part_of(np.array([3])).tolist() == [0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"teachers.wide.data": "photo"}, "'photo' stands for no source of"),
        (
            {"teachers.wide.data": "photos", "teachers.narrow.data": "photos"},
            "no teacher sees the images of '.*drawings'",
        ),
        (
            {"teachers.wide.data": "photos", "drop.unit": "step", "balance.kind": "dropping"},
            "teachers.wide.data must be empty for drop.unit step, got 'photos'",
        ),
        (
            {"teachers.wide.data": "photos", "loss.cls": "contrastive"},
            "teachers.wide.data must be empty for the term contrastive",
        ),
        ({"loss.tokens": "photo=cls"}, "loss.tokens: 'photo' stands for no source of"),
        ({"loss.tokens": "photos"}, "loss.tokens must be SOURCE=patch or SOURCE=cls, .*'photos'"),
        ({"loss.tokens": "photos=both"}, "loss.tokens must be SOURCE=patch or SOURCE=cls"),
        ({"loss.tokens": "photos=cls,photos=patch"}, "loss.tokens must be one kind of token for"),
        (
            {"loss.tokens": "photos=cls,photos/=patch"},
            "loss.tokens gives '.*photos' two kinds of token",
        ),
        (
            {"loss.tokens": "photos=cls", "teachers.narrow.cls_loss": "none"},
            "teacher 'narrow' has no loss of cls tokens, .*photos'; give --teachers.narrow.data",
        ),
        (
            {"loss.tokens": "photos=patch,drawings=patch"},
            "no images with a loss of cls tokens; give --teachers.narrow.cls_loss none",
        ),
        (
            {"loss.tokens": "photos=patch", "teachers.wide.cls_loss": "contrastive"},
            "loss.tokens must be without =patch for the term contrastive",
        ),
        (
            {"stages": "loss.tokens=photo=cls"},
            "loss.tokens: 'photo' stands for no source of",
        ),
    ],
)
def test_what_does_not_fit_is_refused(images: Path, more: dict[str, str], says: str) -> None:
    given = {key: str(value) for key, value in TINY.items()} | {"data.train": mixture(images)}
    with pytest.raises(ValueError, match=says):
        job.resolve(given | {"out": str(images / "refused")} | more)


def test_a_name_of_two_sources_is_refused(images: Path) -> None:
    folder(images / "more" / "photos", 2)
    given = {key: str(value) for key, value in TINY.items()}
    given |= {"data.train": f"{mixture(images)},{images}/more/photos", "out": str(images / "out")}
    with pytest.raises(ValueError, match="'photos' stands for several sources"):
        job.resolve(given | {"teachers.wide.data": "photos"})
    assert job.resolve(given | {"teachers.wide.data": "more/photos"}).cfg.teachers[1].domains
    given["data.train"] = str(images / "photos")
    for option in ({"teachers.wide.data": "photos"}, {"loss.tokens": "photos=cls"}):
        with pytest.raises(ValueError, match="needs a mixture of sources"):
            job.resolve(given | option)


def test_a_teacher_of_a_domain_needs_a_loss_on_its_own_images_alone(images: Path) -> None:
    given = {key: str(value) for key, value in TINY.items()} | {"data.train": mixture(images)}
    given |= {"loss.tokens": "photos=cls", "teachers.narrow.cls_loss": "none"}
    given |= {"teachers.narrow.data": "drawings", "out": str(images / "out")}
    assert job.resolve(given).cfg.loss.kind_of_source == {"photos": "cls"}
