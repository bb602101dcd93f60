"""Teachers that run on a part of a batch give the same tokens, and statistics of that part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unic_ds.config import Standardise, Teacher
from unic_ds.teachers.teacher_set import TeacherSet

PAIRS_TB = np.array([[True, False, True, True, False], [False] * 5])
ROWS = [0, 2, 3]


def two_teachers(**more: object) -> TeacherSet:
    """Two small teachers in fp32."""
    rows = tuple(
        Teacher(name=name, source=f"python:small_teacher:{name}", precision="fp32", **more)
        for name in ("narrow", "wide")
    )
    cpu = torch.device("cpu")
    return TeacherSet(rows, grid=2, standardise=Standardise(), device=cpu)


@pytest.fixture
def images() -> dict[int, torch.Tensor]:
    """Five images of noise."""
    noise = torch.Generator().manual_seed(0)
    return {32: torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=noise)}


@pytest.mark.parametrize("micro", [0, 2])
def test_computed_rows_are_those_of_all_and_others_are_one(
    images: dict[int, torch.Tensor], micro: int
) -> None:
    teachers = two_teachers(micro=micro)
    whole = teachers(images, observe=False)
    part = teachers(images, pairs_TB=PAIRS_TB, observe=False)
    assert part["narrow"].computed_B.tolist() == PAIRS_TB[0].tolist()
    assert not part["wide"].computed_B.any()
    for found, all_of in zip(part["narrow"].features, whole["narrow"].features, strict=True):
        torch.testing.assert_close(found[ROWS], all_of[ROWS])
        assert (found[[1, 4]] == 1).all()
        assert found.shape == all_of.shape
    for found, all_of in zip(part["wide"].features, whole["wide"].features, strict=True):
        assert (found == 1).all()
        assert (found.shape, found.dtype) == (all_of.shape, all_of.dtype)


def test_statistics_are_those_of_the_computed_images(images: dict[int, torch.Tensor]) -> None:
    """A teacher without an image keeps the statistics that it had."""
    part, chosen = two_teachers(), two_teachers()
    part(images, pairs_TB=PAIRS_TB)
    chosen({32: images[32][ROWS]})
    for teachers in (part, chosen):
        teachers.track(1.0)
    found, want = part.state_dict(), chosen.state_dict()
    for name in ("narrow.mean_2C", "narrow.std_2C"):
        torch.testing.assert_close(found[name], want[name], rtol=1e-6, atol=1e-6)
    assert not found["wide.mean_2C"].any()
    assert torch.equal(found["wide.std_2C"], torch.ones_like(found["wide.std_2C"]))


def test_cached_tokens_are_taken_the_same_way(images: dict[int, torch.Tensor]) -> None:
    """All tokens of a batch are there; those of the pairs alone count."""
    online = two_teachers()
    tokens = online.features(images)["narrow"]
    rows = online.rows_of(PAIRS_TB)
    found = online.features(images, {"narrow": tokens}, rows)["narrow"]
    want = online.features(images, None, rows)["narrow"]
    for cached, computed in zip(found, want, strict=True):
        torch.testing.assert_close(cached, computed)


def test_fitting_to_no_image_of_a_teacher_is_refused(images: dict[int, torch.Tensor]) -> None:
    teachers = two_teachers()
    rows = teachers.rows_of(PAIRS_TB)
    with pytest.raises(ValueError, match="'wide': it sees fewer than two images in the batches"):
        teachers.fit([teachers.features(images, None, rows)])
