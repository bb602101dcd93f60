"""A teacher at several sides: the tokens of a run at each side, from weights that are shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import DEMONSTRATION

from unic_ds.config import Standardise, Teacher
from unic_ds.demo import root
from unic_ds.models.resolution import Resolution
from unic_ds.teachers.teacher import load
from unic_ds.teachers.teacher_set import TeacherSet

CPU = torch.device("cpu")
GRIDS = (4, 3, 6)


def rows(**more: str) -> tuple[Teacher, ...]:
    """The demonstration's teachers; the ViT's side follows the student's grid."""
    files = Path(root())
    dino = f"file:{files / 'dinov2_s14_focus.safetensors'}#arch=vit_small_patch14_dinov2"
    effnet = f"file:{files / 'efficientnet_lite0.safetensors'}#arch=tf_efficientnet_lite0"
    return (
        Teacher(name="dinov2", source=dino, **more),  # type: ignore[arg-type]
        Teacher(name="effnet", source=effnet, size=96),
    )


def images(*sides: int) -> dict[int, torch.Tensor]:
    """Random images of each side, uint8 B3HW."""
    draw = torch.Generator().manual_seed(0)
    return {
        side: torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=draw)
        for side in sides
    }


@pytest.fixture(scope="module")
def teachers(demonstration: object) -> TeacherSet:
    """Both teachers at three grids of the student."""
    return TeacherSet(rows(), grid=4, grids=GRIDS, standardise=Standardise(), device=CPU)


@DEMONSTRATION
def test_at_each_grid_it_is_the_teacher_of_a_run_of_that_grid(teachers: TeacherSet) -> None:
    """Bit for bit, with position embeddings that are resampled when the weights are read."""
    for grid in GRIDS:
        sides = {"dinov2": 14 * grid, "effnet": 96}
        shown = images(*sides.values())
        found = teachers.features(shown, resolution=Resolution(16 * grid, grid, sides, 2, 1))
        for row in rows():
            alone = load(row, grid=grid, device=CPU)
            for ours, theirs in zip(found[row.name], alone(shown[alone.size]), strict=True):
                assert torch.equal(ours, theirs)


@DEMONSTRATION
def test_only_position_embeddings_are_kept_for_each_side(teachers: TeacherSet) -> None:
    base, *others = (teachers.by_grid["dinov2"][grid] for grid in GRIDS)
    ours = dict(base.tower.named_parameters())
    for other in others:
        own = {name for name, p in other.tower.named_parameters() if p is not ours[name]}
        assert own == {"model.pos_embed"}
    assert len(set(teachers.by_grid["effnet"].values())) == 1  # its side is given


@DEMONSTRATION
def test_a_side_of_its_own_gives_a_map_of_the_students_grid(teachers: TeacherSet) -> None:
    """As a teacher of that side whose map is resized."""
    sides = {"dinov2": 14 * 6, "effnet": 96}
    shown = images(*sides.values())
    found = teachers.features(shown, resolution=Resolution(48, 3, sides, 2, 1))["dinov2"]
    alone = load(rows(size=84)[0], grid=3, device=CPU)  # type: ignore[arg-type]
    assert found.patch_BNC.shape[1] == 9
    for ours, theirs in zip(found, alone(shown[84]), strict=True):
        assert torch.equal(ours, theirs)


def test_a_source_that_makes_another_model_at_each_call_is_refused() -> None:
    row = Teacher(name="a", source="python:small_teacher:changing")
    with pytest.raises(ValueError, match="'a' has other weights at 48 px than at 32 px"):
        TeacherSet((row,), grid=2, grids=(2, 3), standardise=Standardise(), device=CPU)


@DEMONSTRATION
def test_a_teacher_of_larger_maps_keeps_them(teachers: TeacherSet) -> None:
    row = rows(resize="larger")[:1]
    found = TeacherSet(row, grid=4, grids=GRIDS, standardise=Standardise(), device=CPU)
    side = found.teachers["dinov2"].size
    resolution = Resolution(48, 3, {"dinov2": side}, 2, 1)
    tokens = found.features(images(side), resolution=resolution)["dinov2"]
    assert tokens.patch_BNC.shape[1] == (side // 14) ** 2
