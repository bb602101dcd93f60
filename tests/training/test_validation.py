"""Validation images are tried before the first step, and the student is there whatever they do."""

import shutil

import pytest
from forked import Forked
from pictures import folder
from runs import TRAIN, curve, run, tiny

from unic_ds import config
from unic_ds.doctor import preflight
from unic_ds.training import setup


def command(made, out, **more):
    """One process that trains on the images `train` and is measured on `val`."""
    return Forked(1, [TRAIN, *tiny(made, out, {k.replace("__", "."): v for k, v in more.items()})])


def break_images(made, places):
    """Overwrite the validation images at these places in their order by what is no image."""
    files = sorted((made / "val").glob("*/*.jpg"))
    for place in places:
        files[place].write_text("no image")


@pytest.fixture
def made(tmp_path):
    """16 images to train on and 40 to be measured on."""
    folder(tmp_path / "train", 16)
    folder(tmp_path / "val", 40)
    return tmp_path


def test_broken_images_are_met_before_the_first_step(made):
    break_images(made, range(40))
    printed = run(command(made, "run"), code=2)
    assert "8 of 8 validation images that were tried, below" in printed
    assert "cannot be read (class_0/000.jpg, class_0/010.jpg, " in printed
    assert "--eval.on false" in printed
    assert not (made / "run" / "log.jsonl").exists()

    data = config.Data(train=str(made / "train"), val=str(made / "val"))
    cfg = config.Config(data=data, student=config.Student(size=32))
    with pytest.raises(ValueError, match="8 of 8 validation images that were tried"):
        preflight.check_images("images", preflight.IntendedRun(cfg=cfg, file={}, out=made))

    printed = run(command(made, "run", eval__on="false"))
    said = f"finished; student in {str(made / 'run' / 'student')!r}; it was not evaluated"
    assert f"{said}: --eval.on false" in printed
    again = run(command(made, "run"))
    assert f"{said}: --eval.on false" in again
    assert "┃" not in printed + again


def test_an_evaluation_that_fails_leaves_the_student_and_is_tried_again(made):
    """Few enough are broken for those that are tried first to be sound."""
    whole = shutil.copytree(made / "val", made / "whole")
    break_images(made, (1, 2, 3))
    printed = run(command(made, "run"), code=1)
    student = made / "run" / "student"
    assert f"the student is in {str(student)!r}, but it could not be evaluated" in printed
    assert "images cannot be read below" in printed
    weights = (student / "model.safetensors").read_bytes()
    assert not (made / "run" / "results.json").exists()

    shutil.copytree(whole, made / "val", dirs_exist_ok=True)
    printed = run(command(made, "run"))
    assert "resumed after step 3" in printed
    assert "step 3/3" not in printed
    assert "student after" in printed
    assert (student / "model.safetensors").read_bytes() == weights
    assert list(curve(made / "run")) == [1, 2, 3]


@pytest.mark.parametrize("classes", [0, 1])
def test_images_that_cannot_be_measured_on_are_told_at_the_start(made, classes):
    shutil.rmtree(made / "val")
    folder(made / "val", 3, classes=1)
    if not classes:
        for file in list((made / "val").glob("*/*.jpg")):
            file.rename(made / "val" / file.name)
        (made / "val" / "class_0").rmdir()
    printed = run(command(made, "run", run__stop_at=1))
    assert printed.index("no evaluation: it needs class folders") < printed.index("step 1/3")


@pytest.mark.parametrize(
    ("bad", "limit", "total", "refused"),
    [
        (0, 0.01, 8, False),
        (1, 0.01, 8, False),  # one is always allowed
        (2, 0.01, 8, True),
        (2, 0.01, 50_000, False),  # may be chance
        (3, 0.01, 50_000, True),
        (5, 0.5, 50_000, False),
        (8, 1.0, 50_000, True),  # none can be read
        (1, 0.0, 50_000, False),
    ],
)
def test_as_many_may_be_broken_as_the_limit_says(bad, limit, total, refused):
    assert setup.exceeds_bad_limit(bad, 8, limit=limit, total=total) is refused
