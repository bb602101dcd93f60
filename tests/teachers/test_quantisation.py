"""Teachers of eight bits: near to themselves in bf16, written safely, or refused in a sentence."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from clip_models import clip_model
from safetensors.torch import save_file

from unic_ds import cli, config
from unic_ds.config import overrides, recipes
from unic_ds.planning.trace import teacher_cost
from unic_ds.process import entry_point
from unic_ds.teachers import adapters, quantisation, sources, teacher_set
from unic_ds.teachers.sources import open_clip as open_clip_source
from unic_ds.teachers.sources import timm as timm_source
from unic_ds.teachers.teacher import Teacher, load

CPU = torch.device("cpu")
GRID = 4
ON_CPU = ("int8", "fp8", "int8_dynamic")


def noise(size, count=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def vit(folder):
    """A small ViT with random weights."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "vit.safetensors")
    return config.Teacher(name="t", source=f"file:{folder}/vit.safetensors#arch=test_vit")


@pytest.fixture
def clip(folder):
    """open_clip's own ViT with random weights."""
    torch.manual_seed(0)
    return clip_model(folder, "zoo-vit").eval()


def clip_teacher(model, **keys):
    row = config.Teacher(name="c", source="open_clip:zoo-vit/random", **keys)
    return Teacher(
        row, open_clip_source.visual_tower(row, 64, model), grid=GRID, device=CPU, sample=noise
    )


@pytest.mark.parametrize("kind", ON_CPU)
def test_quantised_blocks_say_what_they_said(vit, clip, kind):
    teacher = load(replace(vit, precision=kind), grid=GRID, device=CPU, sample=noise)
    quantised = {
        name
        for name, part in teacher.tower.named_modules()
        if isinstance(part, torch.nn.Linear) and type(part.weight) is not torch.nn.Parameter
    }
    assert len(quantised) == 4 * 6 and all(".blocks." in name for name in quantised)
    of_clip = clip_teacher(clip, precision=kind)
    for found in (teacher.fidelity, of_clip.fidelity):
        assert min(found["cls"], found["patch"]) >= quantisation.LEAST
        assert found["patch_worst"] <= found["patch"] < 1  # something was rounded
        quantisation.check_agreement("t", kind, found)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.facts()["precision"] == kind


def spoilt(folder):
    """A ViT that int8 cannot hold: each output has a giant weight, whose input is always 0."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    with torch.no_grad():
        for block in model.blocks:
            block.norm2.weight[0] = 0.0
            block.mlp.fc1.weight[:, 0] = 1e4
    save_file(model.state_dict(), folder / "spoilt.safetensors")
    return config.Teacher(
        name="bad", source=f"file:{folder}/spoilt.safetensors#arch=test_vit", precision="int8"
    )


def test_a_teacher_that_changes_is_refused_with_its_figure(folder):
    with pytest.raises(RuntimeError, match=r"'bad' in int8 is not what it was.*0\.\d{4}, below"):
        teacher_set.TeacherSet(
            (spoilt(folder),),
            grid=GRID,
            standardise=config.Standardise(),
            device=CPU,
            sample=noise,
        )


def test_what_cannot_be_is_refused_before_weights_are_read(vit, folder):
    gone = replace(vit, source=vit.source.replace("vit.safe", "gone.safe"))
    with pytest.raises(ValueError, match=r"fp8_dynamic needs a GPU .* this is a CPU; take fp8"):
        load(replace(vit, precision="fp8_dynamic"), grid=GRID, device=CPU)
    with pytest.raises(ValueError, match="fp8_dynamic needs a GPU"):
        teacher_set.fidelities(
            (replace(gone, precision="fp8_dynamic"),), grid=GRID, device=CPU, sample=noise
        )
    with pytest.raises(ValueError, match="placement must be replicate with int8 weights"):
        replace(vit, precision="int8", placement="shard")
    with pytest.raises(ValueError, match="placement must be replicate with channels_last"):
        replace(vit, channels_last=True, placement="offload")
    save_file(timm.create_model("test_efficientnet").state_dict(), folder / "cnn.safetensors")
    source = f"file:{folder}/cnn.safetensors#arch=test_efficientnet"
    cnn = config.Teacher(name="cnn", source=source, precision="int8")
    with pytest.raises(ValueError, match="have no Linears to quantise"):
        load(cnn, grid=GRID, device=CPU)
    with pytest.raises(ValueError, match="have no Linears to quantise"):
        teacher_cost(cnn, GRID, 1)


def check(capfd, *options):
    """(exit code, what was printed) of `unic-ds teachers check` of an online recipe."""
    code = entry_point.run(cli.dispatch, ["teachers", "check", *options])
    out, err = capfd.readouterr()
    return code, out or err.splitlines()[-1]


def test_the_verb_measures_and_refuses(vit, folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("UNIC_DS_CACHE", str(tmp_path))  # where no demonstration is
    small = ["--recipe", "unic_b", "--student.size", "64", "--teachers"]
    code, said = check(capfd, *small, f"t={vit.source}", "--precision", "int8", "--json")
    (row,) = json.loads(said).values()
    assert code == 0 and row["linears"] == 24 and row["patch"] > 0.999
    assert row["images"].startswith("noise")
    code, said = check(capfd, *small, f"bad={spoilt(folder).source}", "--precision", "int8")
    assert code == 1 and "patch" in said
    code, said = check(capfd, *small, f"t={vit.source}", "--precision", "int4")
    assert code == 2 and "must be one of int8, fp8" in said


def test_precision_is_science_and_placement_is_not(vit):
    cfg = replace(recipes.get("unic_b"), teachers=(vit,))

    def science(**keys):
        return overrides.science(replace(cfg, teachers=(replace(vit, **keys),)))

    assert science(placement="offload", micro=3) == science()
    assert science(precision="int8") != science()


def test_images_taken_apart_give_the_same_tokens(vit):
    row = replace(vit, precision="fp32")
    whole, parts = (
        load(replace(row, micro=micro), grid=GRID, device=CPU)(noise(64)) for micro in (0, 3)
    )
    for x, y in zip(whole, parts, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


ATTENDING = {
    "test_vit": 6,
    "vit_small_patch14_reg4_dinov2": 12,
    "test_vit3": 10,  # the last is its attention pool
    "eva02_tiny_patch14_224": 12,
    "vit_small_patch16_dinov3": 12,
    "test_vit_relpos": 9,
    "swin_tiny_patch4_window7_224": 12,
}


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def refuse_written_out(ran, blocks):
    """Every block and pool attends by scaled_dot_product_attention; none writes its matrix out."""
    fused = sum(n for name, n in ran.items() if "_scaled_dot_product_" in name)
    assert fused == blocks, ran
    other = {"aten._softmax", "aten.bmm", "aten.baddbmm", "aten._native_multi_head_attention"}
    assert not other & ran.keys()


@pytest.mark.parametrize("arch", ATTENDING)
def test_timm_teachers_attend_by_sdpa(arch):
    sources.fuse_attention()
    size = 112  # in patches of 14 and 16 pixels
    model = timm.create_model(arch, num_classes=0, img_size=size).eval()
    row = config.Teacher(name="t", source=f"timm:{arch}", precision="fp32")
    tower, _ = timm_source.tower_of(row, model)
    with torch.no_grad(), Operators() as ran:
        tower(torch.zeros(1, 3, size, size))
    refuse_written_out(ran.count, ATTENDING[arch])


def test_open_clip_teachers_attend_by_sdpa(clip):
    tower = adapters.ClipViT(clip.visual, -1)
    with torch.no_grad(), Operators() as ran:
        tower(torch.zeros(1, 3, 64, 64))
    refuse_written_out(ran.count, 2)
    assert isinstance(tower.blocks()[0], open_clip.transformer.ResidualAttentionBlock)


def real_bytes(module):
    """Bytes of a module's weights as they lie in memory."""
    found = 0
    for value in module.parameters():
        parts = [getattr(value, name, None) for name in ("qdata", "scale")]
        parts = [part for part in parts if part is not None] or [value]
        found += sum(part.untyped_storage().nbytes() for part in parts)
    return found


@pytest.mark.parametrize("kind", ["fp32", "bf16", *ON_CPU])
def test_the_planner_knows_what_a_teacher_holds(vit, kind):
    row = replace(vit, precision=kind)
    teacher = load(row, grid=GRID, device=CPU)
    assert teacher_cost(row, GRID, 2).nbytes == pytest.approx(real_bytes(teacher.tower), rel=0.01)


def test_the_planner_knows_of_images_taken_apart(vit):
    runs = {micro: teacher_cost(replace(vit, micro=micro), GRID, 8) for micro in (0, 2, 8)}
    alone = teacher_cost(vit, GRID, 2)
    assert runs[8] == runs[0] and runs[2].flops == runs[0].flops
    assert alone.peak <= runs[2].peak < 0.4 * runs[0].peak


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "fp8", "int8_dynamic", "fp8_dynamic"])
def test_quantised_teachers_on_a_gpu(vit, kind):
    if kind == "fp8_dynamic" and torch.cuda.get_device_capability() < quantisation.FP8_CAPABILITY:
        pytest.skip("this GPU has no fp8 units")
    device = torch.device("cuda")
    teacher = load(replace(vit, precision=kind), grid=GRID, device=device, sample=noise)
    quantisation.check_agreement("t", kind, teacher.fidelity)
