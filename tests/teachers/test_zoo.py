"""Teachers that fit neither each other nor the student, in one pool, under one training step.

Real modules with random weights: patches of 14, 16 and 32 pixels and CNN maps; with and without
CLS token; registers; attention pooling; timm's ViT, rotary ViT, CLIP and SigLIP forms, open_clip's
own ViT and ResNet.
"""

from __future__ import annotations

from typing import NamedTuple

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from clip_models import clip_model
from safetensors.torch import save_file
from torch.nn import functional as F

from unic_ds import config
from unic_ds.losses.distill import distill_loss
from unic_ds.losses.dropping import Dropping
from unic_ds.models.encoder import grid_of
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student
from unic_ds.teachers import sources, teacher_set
from unic_ds.teachers.adapters import MEAN, POOL, TOKEN
from unic_ds.teachers.teacher import load
from unic_ds.tokens import Tokens

CPU = torch.device("cpu")
STUDENT = config.Student(model="vit_tiny_patch16_224", size=64)
GRID = 4
IMAGES = 4


class Member(NamedTuple):
    """Expected properties of a teacher of the zoo."""

    arch: str
    size: int
    own_grid: int
    width: int
    summary: str
    prefix: int = 0  # tokens that are no patches
    channels_last: bool = False


TIMM = {
    "plain16": Member("test_vit", 64, 4, 64, TOKEN, 1),
    "registers14": Member("vit_small_patch14_reg4_dinov2", 56, 4, 384, TOKEN, 5),
    "pooled16": Member("test_vit3", 64, 4, 96, POOL, 1),  # SigLIP's attention pool, a register
    "rotary14": Member("eva02_tiny_patch14_224", 56, 4, 192, TOKEN, 1),
    "clip16": Member("vit_xsmall_patch16_clip_224", 64, 4, 256, TOKEN, 1),
    "bare16": Member("test_vit_relpos", 64, 4, 96, MEAN),
    "hybrid32": Member(
        "vit_tiny_r_s16_p8_224", 128, 4, 192, TOKEN, 1
    ),  # convolutions, patches of 2
    "cnn": Member("test_efficientnet", 160, 5, 256, MEAN, channels_last=True),
}
CLIP = {
    "own32": Member("zoo-vit", 128, 4, 64, TOKEN),
    "resnet": Member("zoo-resnet", 64, 2, 1024, POOL),
}
MEMBERS = TIMM | CLIP


def randomised(model):
    """The model with every parameter random, so that a forgotten norm or bias shows."""
    for value in model.parameters():
        torch.nn.init.normal_(value, 0.0 if value.ndim > 1 else 1.0, 0.1)
    return model.eval()


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
        yield teacher_set.TeacherSet(
            tuple(rows), grid=GRID, standardise=config.Standardise(), device=CPU
        )


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
        seen = (teacher.size, teacher.own_grid, teacher.width, teacher.summary)
        assert seen == (member.size, member.own_grid, member.width, member.summary), name
        cls_BC, patch_BNC = targets[name].standardised()
        assert cls_BC.shape == (IMAGES, member.width), name
        assert patch_BNC.shape == (IMAGES, GRID**2, member.width), name
        assert cls_BC.dtype == patch_BNC.dtype == torch.float32
        assert patch_BNC.std() > 0.01, name


def own_tokens(zoo, batch, name):
    """Output of the teacher's own library: (summary or None, patch tokens or map)."""
    teacher, member = zoo.teachers[name], MEMBERS[name]
    image_B3HW = teacher.normalise(batch[member.size], torch.float32)
    with torch.no_grad():
        if name in CLIP:
            return open_clip_tokens(teacher.tower.visual, image_B3HW)
        model = teacher.tower.model
        found = model.forward_features(image_B3HW)
        if member.summary == POOL:  # the model has no head: its output is what the pool gives
            return model(image_B3HW), found[:, member.prefix :]
    if found.ndim == 4:
        return found.mean((2, 3)), found
    patch_BNC = found[:, member.prefix :]
    return found[:, 0] if member.summary == TOKEN else patch_BNC.mean(1), patch_BNC


def open_clip_tokens(visual, image_B3HW):
    """The same of an open_clip tower, through its own stem and layers."""
    if hasattr(visual, "layer4"):
        return None, visual.layer4(
            visual.layer3(visual.layer2(visual.layer1(visual.stem(image_B3HW))))
        )
    x_BNC = visual.ln_post(visual.transformer(visual._embeds(image_B3HW)))
    return x_BNC[:, 0], x_BNC[:, 1:]


@pytest.mark.parametrize("name", MEMBERS)
def test_tokens_are_the_library_s_own(zoo, batch, name):
    """The summary is the attention pool's, else the CLS token, else the mean of the patches.

    Registers are nobody's patches. (ResNet's summary: test_teacher_sources.py, by its projection.)
    """
    cls_BC, rest = own_tokens(zoo, batch, name)
    if rest.ndim == 4:
        rest = F.interpolate(rest, (GRID, GRID), mode="bicubic", antialias=True)
        rest = rest.flatten(2).transpose(1, 2)
    tokens = zoo.teachers[name](batch[MEMBERS[name].size])
    if cls_BC is not None:
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


NO_TOKENS = "neither ViT tokens nor a square map"
FIXED = "timm cannot resample the positions"
HF_TEXT = "pip install transformers"
FAMILIES = {
    "timm:naflexvit_base_patch16_radio_v3": (112, TOKEN),
    "timm:naflexvit_so400m_patch16_radio_v4": (112, TOKEN),
    "timm:naflexvit_base_patch16_siglip": (112, POOL),
    "timm:vit_base_patch16_radio_v3": (112, TOKEN),
    "timm:vit_base_patch16_siglip_224": (112, POOL),
    "timm:vit_pe_core_tiny_patch16_384": (112, POOL),
    "timm:vit_pe_spatial_tiny_patch16_512": (112, TOKEN),
    "timm:aimv2_large_patch14_224": (98, MEAN),
    "timm:vit_small_patch16_dinov3": (112, TOKEN),
    "timm:vit_base_patch14_reg1_tipsv2": (98, TOKEN),
    "timm:sam2_hiera_tiny": (896, MEAN),
    "timm:vitamin_small_224": (112, MEAN),
    "timm:vit_base_mci_224": (112, TOKEN),
    "timm:vit_base_r50_s16_224": (112, TOKEN),
    "timm:convit_tiny": (224, TOKEN),
    "timm:xcit_nano_12_p8_224": NO_TOKENS,
    "timm:coat_tiny": NO_TOKENS,
    "timm:crossvit_tiny_240": NO_TOKENS,
    "open_clip:coca_ViT-B-32": (224, POOL),
    "open_clip:ViTamin-S": (112, MEAN),
    "open_clip:MobileCLIP-B": (112, TOKEN),
    "open_clip:MobileCLIP2-S0": (256, MEAN),
    "open_clip:PE-Core-T-16-384": (112, POOL),
    "open_clip:ViT-H-14-CLIPA": (98, "mean of patches, normed"),
    "open_clip:RN50": (224, POOL),
    "open_clip:roberta-ViT-B-32": HF_TEXT,
}
"""Families that users ask for, on a grid of 7, with their (image side, summary) or the
words of a refusal."""


@pytest.mark.parametrize("source", FAMILIES)
def test_a_family_works_or_is_refused_before_its_weights_are_read(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as training sets it
    name = source.partition(":")[2]
    tag = f"/{open_clip.list_pretrained_tags_by_model(name)[0]}" if "open_clip" in source else ""
    row, verdict = config.Teacher(name="t", source=source + tag), FAMILIES[source]
    if isinstance(verdict, str):
        with pytest.raises(ValueError, match=verdict):
            sources.outline(row, grid=7)
    else:
        made = sources.outline(row, grid=7)
        assert (made.size, made.tower.summary) == verdict


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"source": "timm:vit_tiny_r_s16_p8_224", "patch": 16}, "patch must be 0 or its own 32"),
        ({"source": "timm:vit_tiny_r_s16_p8_224", "size": 144}, "multiple of its patch 32"),
        ({"source": "timm:naflexvit_base_patch16_radio_v3", "patch": 14}, "0 or its own 16"),
        ({"source": "timm:test_efficientnet", "patch": 16}, "patch must be 0, got 16"),
        ({"source": "timm:convit_tiny", "size": 112}, f"size must be 224, got 112: {FIXED}"),
        ({"source": "open_clip:RN50/openai", "size": 336}, "size must be 0 or the tower's own 224"),
        ({"source": "timm:test_vit.nope"}, "timm has no weights 'test_vit.nope'"),
        ({"source": "open_clip:RN50/nope"}, "open_clip has no 'nope'"),
    ],
)
def test_what_a_family_cannot_be_set_to_is_refused_when_planned(keys, words):
    with pytest.raises(ValueError, match=words):
        sources.outline(config.Teacher(name="t", **keys), grid=7)


SMALL = (
    "test_convnext",
    "test_nfnet",
    "test_mambaout",
    "test_byobnet",
    "test_coatnet",
    "edgenext_xx_small",
    "swiftformer_xs",
    "pvt_v2_b0",
    "fastvit_t8",
    "efficientvit_m0",
    "gcvit_xxtiny",
    "tiny_vit_5m_224",
    "swin_tiny_patch4_window7_224",
    "resnet50_clip",
    "deit_tiny_distilled_patch16_224",
    "vitamin_small_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "vit_pe_core_tiny_patch16_384",
    "naflexvit_base_patch16_radio_v3",
    "convit_tiny",
    "cait_xxs24_224",
)
REFUSED = {
    **dict.fromkeys(("xcit_nano_12_p8_224", "coat_tiny", "crossvit_tiny_240"), NO_TOKENS),
    **dict.fromkeys(("gmlp_ti16_224", "efficientvim_m1", "levit_128s"), NO_TOKENS),
    **dict.fromkeys(("pit_ti_224", "hiera_tiny_224", "mvitv2_tiny", "volo_d1_224"), NO_TOKENS),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*SMALL, *REFUSED])
def test_what_a_plan_says_of_a_family_is_what_its_weights_do(arch, tmp_path):
    """Real weights, read and run: the outline's verdict, sentence and side, and no other."""
    torch.manual_seed(0)
    model = timm.create_model(arch)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    source = f"file:{tmp_path}/w.safetensors#arch={arch}"
    row = config.Teacher(name="t", source=source, precision="fp32")
    if arch in REFUSED:
        said = []
        for start in (lambda: sources.outline(row, grid=7), lambda: load(row, grid=7, device=CPU)):
            with pytest.raises(ValueError, match=REFUSED[arch]) as error:
                start()
            said.append(str(error.value))
        assert said[0] == said[1]
        return
    planned, teacher = sources.outline(row, grid=7), load(row, grid=7, device=CPU)
    assert (planned.size, planned.tower.summary) == (teacher.size, teacher.summary)
    generator = torch.Generator().manual_seed(1)
    shape = (2, 3, teacher.size, teacher.size)
    image_B3HW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    cls_BC, patch_BNC = teacher(image_B3HW)
    assert cls_BC.shape == (2, model.num_features)
    assert patch_BNC.shape == (2, 49, model.num_features)
    assert (patch_BNC[0] - patch_BNC[0, 0]).abs().amax(1)[1:].min() > 0  # no patch twice
