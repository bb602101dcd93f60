"""Teachers that fit neither each other nor the student, in one pool, under one training step.

Real modules with random weights: patches of 14, 16 and 32 pixels and CNN maps; with and without
CLS token; registers; attention pooling; timm's ViT, rotary ViT, CLIP and SigLIP forms, open_clip's
own ViT and ResNet.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from unic_ds import config
from unic_ds.balance import Dropping
from unic_ds.ladder import Head
from unic_ds.loss import distill_loss
from unic_ds.student import Student, grid_of
from unic_ds.teachers import pool, sources
from unic_ds.tokens import Tokens

CPU = torch.device("cpu")
STUDENT = config.Student(model="vit_tiny_patch16_224", size=64)
GRID = 4
IMAGES = 4


class Member(NamedTuple):
    """What a teacher of the zoo must turn out to be."""

    arch: str
    size: int
    own_grid: int
    width: int
    has_cls: bool
    prefix: int = 0  # tokens that are no patches
    channels_last: bool = False


TIMM = {
    "plain16": Member("test_vit", 64, 4, 64, True, 1),
    "registers14": Member("vit_small_patch14_reg4_dinov2", 56, 4, 384, True, 5),
    "pooled16": Member("test_vit3", 64, 4, 96, False, 1),  # SigLIP's attention pool, a register
    "rotary14": Member("eva02_tiny_patch14_224", 56, 4, 192, True, 1),
    "clip16": Member("vit_xsmall_patch16_clip_224", 64, 4, 256, True, 1),
    "bare16": Member("test_vit_relpos", 64, 4, 96, False),
    "cnn": Member("test_efficientnet", 160, 5, 256, False, channels_last=True),
}
CLIP = {
    "own32": Member("zoo-vit", 128, 4, 64, True),
    "resnet": Member("zoo-resnet", 64, 2, 1024, False),
}
MEMBERS = TIMM | CLIP
TEXT = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
VISION = {
    "zoo-vit": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
    "zoo-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32},
    "zoo-coca": {"image_size": 64, "layers": 1, "width": 64, "attentional_pool": True},
}


def randomised(model):
    """The model with every parameter random, so that a forgotten norm or bias shows."""
    for value in model.parameters():
        torch.nn.init.normal_(value, 0.0 if value.ndim > 1 else 1.0, 0.1)
    return model.eval()


def clip_model(folder, name):
    """An open_clip model of ours by name."""
    (folder / f"{name}.json").write_text(
        json.dumps({"embed_dim": 16, "text_cfg": TEXT, "vision_cfg": VISION[name]})
    )
    open_clip.add_model_config(folder / f"{name}.json")
    return open_clip.create_model(name)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The pool of all of them, from weight files where each kind of source looks for them."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.manual_seed(0)
    rows = []
    for name, member in TIMM.items():
        path = folder / f"{name}.safetensors"
        save_file(randomised(timm.create_model(member.arch)).state_dict(), path)
        source = f"file:{path}#arch={member.arch}"
        row = {"source": source, "channels_last": member.channels_last}
        rows.append(config.Teacher(name=name, precision="fp32", **row))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))  # open_clip keeps what it downloads under ~/.cache/clip
        (folder / ".cache" / "clip").mkdir(parents=True)
        for name, member in CLIP.items():
            model = randomised(clip_model(folder, member.arch))
            torch.save(model.state_dict(), folder / ".cache" / "clip" / f"{member.arch}.pt")
            tags = {"random": {"url": f"https://nowhere/{member.arch}.pt"}}
            patch.setitem(open_clip.pretrained._PRETRAINED, member.arch, tags)
            source = f"open_clip:{member.arch}/random"
            rows.append(config.Teacher(name=name, source=source, precision="fp32"))
        yield pool.Teachers(tuple(rows), grid=GRID, standardise=config.Standardise(), device=CPU)


@pytest.fixture(scope="module")
def batch(zoo):
    """A batch of images at every size that is asked for."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(0, 256, (IMAGES, 3, 160, 160), dtype=torch.uint8, generator=generator)
    return {
        size: F.interpolate(whole.float(), (size, size), mode="area").round().to(torch.uint8)
        for size in {STUDENT.size, *zoo.sizes}
    }


def test_each_is_what_it_is_and_all_end_on_the_student_s_grid(zoo, batch):
    assert grid_of(STUDENT) == GRID
    assert zoo.sizes == (56, 64, 128, 160)
    targets = zoo(batch, observe=False)
    assert list(targets) == list(MEMBERS) == list(zoo.widths)
    for name, member in MEMBERS.items():
        teacher = zoo.teachers[name]
        seen = (teacher.size, teacher.own_grid, teacher.width, teacher.has_cls)
        assert seen == (member.size, member.own_grid, member.width, member.has_cls), name
        cls_BC, patch_BNC = targets[name].standardised()
        assert cls_BC.shape == (IMAGES, member.width), name
        assert patch_BNC.shape == (IMAGES, GRID**2, member.width), name
        assert cls_BC.dtype == patch_BNC.dtype == torch.float32
        assert patch_BNC.std() > 0.01, name


def own_tokens(zoo, batch, name):
    """What the teacher's own library gives: (prefix tokens, patch tokens or map)."""
    teacher, member = zoo.teachers[name], MEMBERS[name]
    image_B3HW = teacher.normalise(batch[member.size], torch.float32)
    with torch.no_grad():
        if name in CLIP:
            return open_clip_tokens(teacher.tower.visual, image_B3HW)
        found = teacher.tower.model.forward_features(image_B3HW)
    return (
        (None, found) if found.ndim == 4 else (found[:, : member.prefix], found[:, member.prefix :])
    )


def open_clip_tokens(visual, image_B3HW):
    """The same of an open_clip tower, through its own stem and layers."""
    if hasattr(visual, "layer4"):
        return None, visual.layer4(
            visual.layer3(visual.layer2(visual.layer1(visual.stem(image_B3HW))))
        )
    x_BNC = visual.ln_post(visual.transformer(visual._embeds(image_B3HW)))
    return x_BNC[:, :1], x_BNC[:, 1:]


@pytest.mark.parametrize("name", MEMBERS)
def test_tokens_are_the_library_s_own(zoo, batch, name):
    """CLS is the CLS token, else the mean of the patches; registers are nobody's patches."""
    prefix_BRC, rest = own_tokens(zoo, batch, name)
    if rest.ndim == 4:
        cls_BC = rest.mean((2, 3))
        rest = F.interpolate(rest, (GRID, GRID), mode="bicubic", antialias=True)
        rest = rest.flatten(2).transpose(1, 2)
    else:
        cls_BC = prefix_BRC[:, 0] if MEMBERS[name].has_cls else rest.mean(1)
    tokens = zoo.teachers[name](batch[MEMBERS[name].size])
    torch.testing.assert_close(tokens.cls_BC, cls_BC, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.patch_BNC, rest, rtol=1e-4, atol=1e-4)


def test_one_student_learns_from_all_of_them(zoo, batch):
    torch.manual_seed(0)
    ladder = config.Ladder(rungs="5,11", width=48)
    heads = {name: Head(width) for name, width in zoo.widths.items()}
    student = Student(STUDENT, ladder, heads, seed=0).train()
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    dropping = Dropping(torch.ones(len(MEMBERS)), config.Drop(rate=0.25), "expected")
    zoo(batch)
    zoo.track(1.0)
    target = zoo(batch, observe=False)
    uniform_TB = torch.rand(len(MEMBERS), IMAGES)
    losses = []
    for _ in range(8):
        pred: dict[str, Tokens] = student(batch[STUDENT.size])
        loss, metrics = distill_loss(pred, target, uniform_TB, loss=config.Loss(), balance=dropping)
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in trained.items() if p.grad is None or not p.grad.any()] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert {f"{name}/patch_cosine" for name in MEMBERS} <= metrics.keys()


def test_a_tower_without_tokens_of_its_own_is_refused(tmp_path):
    """CoCa pools by attention where others have tokens after their last norm."""
    row = config.Teacher(name="t", source="open_clip:zoo-coca/random", precision="fp32")
    with pytest.raises(ValueError, match="pool by attention"):
        sources.clip_source(row, 64, clip_model(tmp_path, "zoo-coca"))
