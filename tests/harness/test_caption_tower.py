"""Zero-shot classification end to end: captions, a CLIP, a student that predicts its tokens."""

from __future__ import annotations

from pathlib import Path

import caption_tower
import open_clip
import pytest
import torch
from caption_tower import FOLDERS, GRID, NAME, ROW, STAMPS
from memory_sets import MemoryImages, scores_of
from open_clip import pretrained

from unic_ds.harness import text_towers
from unic_ds.teachers.teacher import load
from unic_ds.tokens import Normalise

CPU = torch.device("cpu")


@pytest.mark.skipif(not STAMPS.is_dir(), reason="needs Debian's tuxpaint-stamps-default")
def test_a_student_names_stamps_that_neither_model_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's accuracy is that of open_clip's own pipeline; the student's is near it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen, unseen = caption_tower.read_stamps()
    caption_tower.place_clip(tmp_path, seen)
    teacher = load(ROW, grid=GRID, device=CPU)
    models = [
        caption_tower.student_model(teacher, seen),
        caption_tower.teacher_model(teacher),
    ]
    towers = text_towers.read_all([ROW], grid=GRID, device=CPU)
    images = MemoryImages(unseen.image_N3HW, unseen.label_N, tuple(FOLDERS))
    sets = {"train": images, "val": images}
    student, clip = scores_of("zeroshot", models, sets, text_towers=towers)

    model = open_clip.create_model(NAME, pretrained="toy").eval()
    class_EL = open_clip.build_zero_shot_classifier(
        model,
        open_clip.get_tokenizer(NAME),
        [name.replace("_", " ") for name in FOLDERS],
        open_clip.OPENAI_IMAGENET_TEMPLATES,
    )
    normalise = Normalise(model.visual.image_mean, model.visual.image_std)
    with torch.no_grad():
        image_BE = model.encode_image(normalise(unseen.image_N3HW, torch.float32), normalize=True)
    right_N = (image_BE @ class_EL).argmax(1) == unseen.label_N
    pretrained._PRETRAINED.pop(NAME)

    assert clip.model == "teacher clip"
    assert clip.value == pytest.approx(100 * float(right_N.float().mean()))
    assert (student.model, student.name) == ("student", clip.name)
    chance = 100 / len(FOLDERS)
    assert clip.value > 3 * chance
    assert student.value > 2.5 * chance
