"""Shift-equivariant patch loss: shifted images have the same patches where they overlap."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from unic_ds.config import Balance, Config, Drop, Loss, Standardise, Teacher
from unic_ds.losses import balance
from unic_ds.losses.distill import distill_loss
from unic_ds.models.resolution import Resolution, Shift
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import Target, Tokens, part_of_map

GRID, MARGIN = 4, 2
PLACES = list(itertools.product(range(MARGIN + 1), repeat=2))
DECODED_B3HW = torch.randint(
    0, 256, (2, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def resolution(student: tuple[int, int], teachers: tuple[int, int], side: int = 64) -> Resolution:
    """A step of a 64-pixel student and a teacher `a` of that side."""
    return Resolution(64, GRID, {"a": side}, 2, 1, Shift(MARGIN, student, teachers))


@pytest.mark.parametrize("student", PLACES)
def test_the_overlap_shows_the_same_patches(student: tuple[int, int]) -> None:
    for teachers in PLACES:
        step = resolution(student, teachers)
        ours, theirs = step.shift.overlaps(GRID)  # type: ignore[union-attr]
        one_B3HW = step.student_images({96: DECODED_B3HW})
        other_B3HW = step.teacher_images({96: DECODED_B3HW}, "a")
        patch_BNC, target_BNC = (
            F.unfold(image_B3HW.float(), 16, stride=16).transpose(1, 2)
            for image_B3HW in (one_B3HW, other_B3HW)
        )
        assert torch.equal(part_of_map(patch_BNC, ours), part_of_map(target_BNC, theirs))
        moved = [abs(a - b) for a, b in zip(student, teachers, strict=True)]
        count = (GRID - moved[0]) * (GRID - moved[1])
        assert part_of_map(patch_BNC, ours).shape[1] == count


def test_a_student_that_moves_with_its_image_has_no_patch_loss() -> None:
    """It predicts the tokens of its own image; those of the teacher's image are the targets."""
    row = Teacher(name="a", source="python:small_teacher:following", precision="fp32")
    cfg = Config(teachers=(row,), drop=Drop(rate=0), balance=Balance(kind="none"))
    teachers = TeacherSet(
        (row,), grid=GRID, standardise=Standardise(on=False), device=torch.device("cpu")
    )
    step, images = resolution((0, 2), (2, 1)), {96: DECODED_B3HW}
    target = teachers(images, resolution=step)
    pred = teachers.teachers["a"](step.student_images(images))
    losses = [
        distill_loss(
            {"a": Tokens(target["a"].features.cls_BC, pred.patch_BNC)},
            target,
            torch.zeros(1, 2),
            loss=Loss(),
            balance=balance.build(cfg),
            overlaps=overlaps,
        )[0].item()
        for overlaps in (step.shift.overlaps(GRID), None)  # type: ignore[union-attr]
    ]
    assert losses[0] == pytest.approx(0, abs=1e-6) and losses[1] > 0.05


def test_the_loss_is_that_of_the_common_patches() -> None:
    """A plain formula in fp64: the mean over the patches that both images show."""
    draw = torch.Generator().manual_seed(1)
    pred, features = (
        Tokens(torch.randn(2, 8, generator=draw), torch.randn(2, 16, 8, generator=draw))
        for _ in range(2)
    )
    shift = Shift(MARGIN, (0, 1), (2, 0))
    cfg = Config(teachers=(Teacher(name="a", source="python:x:y"),), drop=Drop(rate=0))
    loss, _ = distill_loss(
        {"a": pred},
        {"a": Target.of(features)},
        torch.zeros(1, 2),
        loss=Loss(cls="none", patch="1 mse"),
        balance=balance.build(cfg),
        overlaps=shift.overlaps(GRID),
    )
    squares = []
    for row, column in itertools.product(range(GRID), repeat=2):  # the teacher's patch
        place = row + 2 - 0, column + 0 - 1  # of the same part of the image in the student's grid
        if all(0 <= at < GRID for at in place):
            ours_BC = pred.patch_BNC[:, GRID * place[0] + place[1]].double()
            theirs_BC = features.patch_BNC[:, GRID * row + column].double()
            squares.append((ours_BC - theirs_BC).square().mean(1))
    assert len(squares) == 6
    assert loss.item() == pytest.approx(torch.stack(squares).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("side", "grid"), [(385, 14), (455, 14), (91, 14), (96, 7), (260, 16)])
@pytest.mark.parametrize("margin", [1, 2, 3])
def test_every_place_lies_in_the_decoded_image(side: int, grid: int, margin: int) -> None:
    """Whatever the side of a teacher's images is."""
    for at in range(margin + 1):
        step = Resolution(16 * grid, grid, {"a": side}, 1, 1, Shift(margin, (0, 0), (at, margin)))
        decoded = step.decoded(side)
        image_B3HW = torch.zeros(1, 3, decoded, decoded)
        assert step.teacher_images({decoded: image_B3HW}, "a").shape[2:] == (side, side)


def test_sides_that_no_patch_divides_are_rounded() -> None:
    """A CNN's image has the place of the student's to half a pixel."""
    step = resolution((0, 0), (1, 2), side=90)
    assert step.decoded(90) == 135
    image_B3HW = step.teacher_images({135: torch.arange(135.0).expand(1, 3, 135, 135)}, "a")
    assert image_B3HW.shape == (1, 3, 90, 90) and image_B3HW[0, 0, 0, 0] == 45
