"""A toy: a small CLIP that learns stamps from their captions, and a student that learns from it.

The stamps are those of Debian's `tuxpaint-stamps-default` (GPL-2). Each is a drawing or photograph
with a line of text. The CLIP is one of open_clip, and its weights lie where open_clip's own client
keeps downloads, so that it is loaded as any published one: `open_clip:stamps/toy`.
`python tests/support/caption_tower.py` places it; `--plugins caption_tower` makes it known.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from open_clip import pretrained
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config
from unic_ds.evaluate.features import Model, ModelOutput, Outputs
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student
from unic_ds.teachers.standardise import Standardiser
from unic_ds.teachers.teacher import Teacher
from unic_ds.tokens import Normalise, Tokens

STAMPS = Path("/usr/share/tuxpaint/stamps")
FOLDERS = {
    "animal": "animals",
    "chess_piece": "symbols/chess",
    "coin": "symbols/money",
    "fruit": "food/fruit",
    "hand": "symbols/alphabets/asl",
    "letter": "symbols/alphabets/english",
    "planet": "space/planets",
    "house": "town/houses",
}
"""Class -> folder."""
SIDE, GRID, UNSEEN = 32, 2, 6
"""Pixels, side of the student's patch grid, stamps of each class that are held out."""
NAME = "stamps"
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VISION = {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
ROW = config.Teacher(name="clip", source=f"open_clip:{NAME}/toy", size=SIDE, precision="fp32")


class Stamps(NamedTuple):
    """Stamps on white, with their captions and classes."""

    image_N3HW: Tensor
    caption: list[str]
    label_N: Tensor

    def part(self, place_M: Tensor) -> Stamps:
        """Some of them."""
        captions = [self.caption[place] for place in place_M.tolist()]
        return Stamps(self.image_N3HW[place_M], captions, self.label_N[place_M])


def read_stamps() -> tuple[Stamps, Stamps]:
    """The stamps to train on, and UNSEEN of each class."""
    images, captions, labels = [], [], []
    for label, folder in enumerate(FOLDERS.values()):
        for file in sorted((STAMPS / folder).rglob("*.png")):
            if (text := file.with_suffix(".txt")).is_file():
                images.append(on_white(file))
                captions.append(text.read_text(errors="replace").splitlines()[0])
                labels.append(label)
    every = Stamps(torch.stack(images), captions, torch.tensor(labels))
    order_N = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = [order_N[every.label_N[order_N] == label] for label in range(len(FOLDERS))]
    unseen, seen = zip(*(place_M.tensor_split([UNSEEN]) for place_M in by_class), strict=True)
    return every.part(torch.cat(seen)), every.part(torch.cat(unseen))


def on_white(file: Path) -> Tensor:
    """A stamp (3, SIDE, SIDE) on a white square."""
    with Image.open(file) as image:
        stamp = image.convert("RGBA")
    stamp.thumbnail((SIDE, SIDE))
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(stamp, ((SIDE - stamp.width) // 2, (SIDE - stamp.height) // 2))
    return torch.from_numpy(np.asarray(square.convert("RGB")).copy()).permute(2, 0, 1)


def place_clip(home: Path, stamps: Stamps, steps: int = 250) -> None:
    """Train the CLIP and place it in the cache of open_clip below a home folder."""
    cache = home / ".cache" / "clip"
    cache.mkdir(parents=True, exist_ok=True)
    outline = {"embed_dim": 32, "text_cfg": TEXT, "vision_cfg": VISION}
    (cache / f"{NAME}.json").write_text(json.dumps(outline))
    register(home)
    save_file(train_clip(stamps, steps).state_dict(), cache / f"{NAME}.safetensors")


def register(home: Path) -> None:
    """Tell open_clip of the CLIP below a home folder, if it is there."""
    file = home / ".cache" / "clip" / f"{NAME}.json"
    if file.is_file():
        open_clip.add_model_config(file)
        scale = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
        pretrained._PRETRAINED[NAME] = {"toy": {"url": f"https://none/{NAME}.safetensors"} | scale}


def train_clip(stamps: Stamps, steps: int) -> open_clip.CLIP:
    """A CLIP trained by the contrastive loss on half captions, half names of classes.

    All images of a class are right for a text: with few stamps, captions alone teach no classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(NAME)
    draws, tokenize = torch.Generator().manual_seed(0), open_clip.get_tokenizer(NAME)
    names = [list(FOLDERS)[label].replace("_", " ") for label in stamps.label_N.tolist()]
    pairs = zip(names, stamps.caption, strict=True)
    token_2NT = torch.stack(
        [tokenize([f"a {name}" for name in names]), tokenize([f"{n}: {c}" for n, c in pairs])]
    )
    normalise = Normalise(model.visual.image_mean, model.visual.image_std)
    chance_N = (1 / stamps.label_N.bincount())[stamps.label_N]
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps)
    for _ in range(steps):
        place_B = torch.multinomial(chance_N, 48, generator=draws)
        caption_B = torch.randint(2, (48,), generator=draws)
        image_B3HW = shifted(stamps.image_N3HW[place_B], draws)
        image_BE = model.encode_image(normalise(image_B3HW, torch.float32), True)
        text_BE = model.encode_text(token_2NT[caption_B, place_B], normalize=True)
        logit_BB = model.logit_scale.exp() * image_BE @ text_BE.T
        label_B = stamps.label_N[place_B]
        right_BB = F.normalize((label_B[:, None] == label_B).float(), p=1, dim=1)
        loss = F.cross_entropy(logit_BB, right_BB) + F.cross_entropy(logit_BB.T, right_BB)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def shifted(image_B3HW: Tensor, draws: torch.Generator) -> Tensor:
    """Images moved by at most 4 px, all alike; the white border hides that they wrap around."""
    y, x = torch.randint(-2, 3, (2,), generator=draws).tolist()
    return image_B3HW.roll((y, x), (2, 3))


def teacher_model(teacher: Teacher) -> Model:
    """A teacher as a model whose projection is its own tokens."""

    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        return Outputs(projection={teacher.name: teacher(image_B3HW)})

    return Model(f"teacher {teacher.name}", teacher.size, frozenset({"projection"}), encode)


def student_model(teacher: Teacher, stamps: Stamps, steps: int = 250) -> Model:
    """A student trained on standardised targets, as a model that predicts the teacher's tokens."""
    tokens = teacher(stamps.image_N3HW)
    standardiser = Standardiser(teacher.width, config.Standardise())
    standardiser.observe(tokens)
    standardiser.fit(standardiser.moments()[None], lambda total: total)
    target = standardiser(tokens)
    student = train_student(teacher, standardiser, stamps, steps)

    @torch.no_grad()
    def encode(image_B3HW: Tensor, _: frozenset[ModelOutput]) -> Outputs:
        found = student(image_B3HW)[teacher.name]
        undone = (
            y * divisor_C + mean_C
            for y, divisor_C, mean_C in zip(found, target.divisor_2C, target.mean_2C, strict=True)
        )
        return Outputs(projection={teacher.name: Tokens(*undone)})

    return Model("student", SIDE, frozenset({"projection"}), encode, "student")


def train_student(
    teacher: Teacher, standardiser: Standardiser, stamps: Stamps, steps: int
) -> Student:
    """A small student with a ladder, trained by the squared error of both kinds of token."""
    cfg = config.Student(model="test_vit", size=SIDE)
    heads = {teacher.name: Head(teacher.width)}
    student = Student(cfg, config.Ladder(rungs="2,5", width=64), heads, seed=0)
    optimiser = torch.optim.AdamW(student.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, steps)
    draws = torch.Generator().manual_seed(1)
    for _ in range(steps):
        place_B = torch.randint(len(stamps.label_N), (48,), generator=draws)
        image_B3HW = shifted(stamps.image_N3HW[place_B], draws)
        pred, target = student(image_B3HW)[teacher.name], standardiser(teacher(image_B3HW))
        loss = sum(map(F.mse_loss, pred, target.standardised()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return student.eval()


register(Path.home())

if __name__ == "__main__":
    place_clip(Path.home(), read_stamps()[0])
    print(f"open_clip:{NAME}/toy is in {Path.home() / '.cache' / 'clip'}")
