"""Teachers of every kind: built from files and caches on disk, run, standardised, refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from runs import DEMONSTRATION, LOST, alone, run
from safetensors.torch import save_file
from torch import Tensor

from unic_ds import config, demo
from unic_ds.teachers import cache, sources, teacher_set
from unic_ds.teachers.sources import open_clip as open_clip_source
from unic_ds.teachers.teacher import Teacher, load
from unic_ds.tokens import Normalise, Tokens
from unic_ds.training import run_dir

CPU = torch.device("cpu")
GRID = 4
ROOT = Path(__file__).resolve().parents[2]
PATH_HERE = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def images(side: int, count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def random_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A timm model with random weights; affine parts too, so that a forgotten norm shows."""
    torch.manual_seed(seed)
    model = timm.create_model(name).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, 0.0 if value.ndim > 1 else 1.0, 0.1)
    return model


def row_of(path: Path, arch: str, **keys) -> config.Teacher:
    return config.Teacher(
        **{"name": "t", "source": f"file:{path}#arch={arch}", "precision": "fp32"} | keys
    )


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> tuple[torch.nn.Module, config.Teacher]:
    """A tiny ViT at its own size 160 and the row that loads its file."""
    model = random_model("test_vit")
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(model.state_dict(), path, metadata={"licence": "MIT"})
    return model, row_of(path, "test_vit", size=160)


def expected(model: torch.nn.Module, image_B3HW: Tensor) -> Tensor:
    """timm's own features of the images under timm's own preprocessing."""
    wants = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(wants[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return model.forward_features((image_B3HW / 255 - mean) / std)


def test_file_vit_gives_timms_features(vit):
    model, row = vit
    teacher = load(row, grid=10, device=CPU)
    features_BNC = expected(model, images(160))
    tokens = teacher(images(160))
    assert (teacher.patch, teacher.width, teacher.own_grid, teacher.has_cls) == (16, 64, 10, True)
    torch.testing.assert_close(tokens.cls_BC, features_BNC[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.patch_BNC, features_BNC[:, 1:], rtol=1e-4, atol=1e-4)


def test_teacher_is_frozen_and_its_tokens_can_be_a_loss_target(vit):
    teacher = load(vit[1], grid=GRID, device=CPU)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.train().modules())
    tokens = teacher(images(160))
    assert tokens.patch_BNC.shape == (3, GRID * GRID, 64)
    pred_BC = torch.ones_like(tokens.cls_BC, requires_grad=True)
    torch.nn.functional.smooth_l1_loss(pred_BC, tokens.cls_BC).backward()
    assert pred_BC.grad is not None


def test_vit_size_makes_the_grids_agree(vit):
    teacher = load(replace(vit[1], size=0), grid=GRID, device=CPU)
    assert (teacher.size, teacher.own_grid) == (16 * GRID, GRID)
    other = load(replace(vit[1], size=0, patch=8), grid=GRID, device=CPU)
    assert (other.size, other.patch, other.own_grid) == (8 * GRID, 8, GRID)


def test_block_reads_the_residual_stream(vit):
    model, row = vit
    teacher = load(replace(row, block="2"), grid=10, device=CPU)
    seen: list[Tensor] = []
    hook = model.blocks[2].register_forward_hook(lambda _, __, out: seen.append(out))
    expected(model, images(160))
    hook.remove()
    tokens = teacher(images(160))
    torch.testing.assert_close(tokens.cls_BC, seen[0][:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.patch_BNC, seen[0][:, 1:], rtol=1e-4, atol=1e-4)
    assert len(teacher.tower.model.blocks) == 3  # what comes after is not kept


def test_bf16_stays_close(vit):
    exact = load(vit[1], grid=10, device=CPU)(images(160))
    half = load(replace(vit[1], precision="bf16"), grid=10, device=CPU)(images(160))
    assert half.cls_BC.dtype == torch.bfloat16
    assert torch.cosine_similarity(half.patch_BNC.float(), exact.patch_BNC, dim=-1).min() > 0.99


def test_overrides_go_before_the_sources_config(vit):
    teacher = load(
        replace(vit[1], mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), grid=GRID, device=CPU
    )
    facts = teacher.facts()
    assert (facts["mean"], facts["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert facts["licence"] == "MIT"
    assert facts["sha256"] == sources.facts(vit[1])["sha256"]


@pytest.mark.parametrize("arch", ["test_convnext", "test_efficientnet"])
def test_cnn_map_is_resized(arch, tmp_path):
    model = random_model(arch)
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
        tmp_path / "cnn.pth",
    )
    teacher = load(row_of(tmp_path / "cnn.pth", arch, channels_last=True), grid=GRID, device=CPU)
    assert (teacher.size, teacher.own_grid, teacher.patch, teacher.has_cls) == (160, 5, 32, False)
    map_BCHW = expected(model, images(160))
    tokens = teacher(images(160))
    torch.testing.assert_close(tokens.cls_BC, map_BCHW.mean((2, 3)), rtol=1e-3, atol=1e-4)
    assert tokens.patch_BNC.shape == (3, GRID * GRID, map_BCHW.shape[1])


def test_weights_without_a_head_load(vit, tmp_path):
    state = {k: v for k, v in vit[0].state_dict().items() if not k.startswith("head.")}
    save_file(state, tmp_path / "bare.safetensors")
    teacher = load(row_of(tmp_path / "bare.safetensors", "test_vit"), grid=GRID, device=CPU)
    assert teacher.width == 64


def refused(row: config.Teacher, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        load(row, grid=GRID, device=CPU)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_file_names_the_fetch_command(tmp_path):
    refused(
        row_of(tmp_path / "no.pth", "test_vit"),
        "'t'",
        "no.pth",
        "put them there or give --teachers.t.source (`unic-ds teachers fetch` has those of hubs)",
    )


def test_half_a_file_is_refused(vit, tmp_path):
    state = {k: v for k, v in vit[0].state_dict().items() if "blocks.5" not in k}
    save_file(state, tmp_path / "half.safetensors")
    refused(row_of(tmp_path / "half.safetensors", "test_vit"), "do not fit test_vit", "blocks.5")
    path = sources.locate(vit[1])
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    refused(row_of(tmp_path / "cut.safetensors", "test_vit"), "cut.safetensors")


class Bomb:
    """A pickle that runs a command where it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_run(tmp_path):
    torch.save({"state_dict": Bomb(tmp_path / "owned")}, tmp_path / "evil.pth")
    refused(row_of(tmp_path / "evil.pth", "test_vit"), "evil.pth", "safetensors")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"size": 100}, ("multiple", "16", "100")),
        ({"block": "6"}, ("block", "below 6")),
        ({"source": "timm:test_vitt"}, ("did you mean test_vit",)),
        ({"source": "timm:test_vit.nope"}, ("test_vit.r160_in1k",)),
        ({"source": "open_clip:ViT-B-33/openai"}, ("did you mean ViT-B-32",)),
        ({"source": "open_clip:ViT-B-32/nope"}, ("openai",)),
        ({"source": "python:nowhere:make"}, ("nowhere", "PYTHONPATH")),
        ({"source": "python:json:nothing"}, ("no function 'nothing'",)),
        ({"source": "python:os:getcwd"}, ("torch module", "str")),
    ],
)
def test_refusals(vit, keys, words):
    refused(replace(vit[1], **keys), *words)


def test_unknown_arch_is_refused(vit):
    refused(replace(vit[1], source=vit[1].source + "x"), "test_vitx", "did you mean test_vit")


USER = """
import torch
from torch import nn

class Edges(nn.Module):
    {attributes}

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)

    def forward(self, image):
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        return {result}

def make():
    torch.manual_seed(0)
    return Edges()
"""


def user_row(folder: Path, monkeypatch, name: str, attributes: str, result: str) -> config.Teacher:
    """A teacher row whose python module was just written."""
    (folder / f"{name}.py").write_text(USER.format(attributes=attributes, result=result))
    monkeypatch.syspath_prepend(folder)
    return config.Teacher(name="t", source=f"python:{name}:make", precision="fp32")


def test_python_teacher(tmp_path, monkeypatch):
    said = "patch_size, mean, std, licence = 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 'CC0'"
    row = user_row(tmp_path, monkeypatch, "edges_a", said, "tokens.mean(1), tokens")
    teacher = load(row, grid=GRID, device=CPU)
    assert (teacher.size, teacher.width, teacher.own_grid) == (8 * GRID, 8, GRID)
    tokens = teacher(images(8 * GRID))
    truth = teacher.tower.model((images(8 * GRID) / 255 - 0.5) / 0.5)
    torch.testing.assert_close(tokens.patch_BNC, truth[1])
    assert (teacher.facts()["licence"], len(teacher.facts()["sha256"])) == ("CC0", 64)


SAID = "patch_size, mean, std = 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)"
BAD_OUTPUT = {
    "None, tokens": "gives no CLS token: return the mean of the patches",
    "tokens.mean(1), None": "gives patch as NoneType",
    "tokens": "must return Tokens(cls, patch) from its forward, got Tensor",
    "{'cls': tokens.mean(1), 'patch': tokens}": "got dict",
    "(tokens,)": "got tuple of 1",
    "tokens.mean(1).tolist(), tokens": "gives cls as list",
    "tokens.mean(1).numpy(), tokens": "gives cls as ndarray",
    "tokens.mean(1), tokens[:, 1:]": "(2, 15, 8) for 2 images; it must be [B, C] and [B, N, C]",
    "tokens.mean(1), tokens.unflatten(1, (4, 4))": "(2, 4, 4, 8)",
    "tokens.mean(1)[:, :4], tokens": "cls (2, 4)",
    "tokens.mean(1)[:1], tokens[:1]": "cls (1, 8)",
    "tokens.mean(1).squeeze(), tokens.squeeze()": "cls (8,) and patch (16, 8) for 1 images",
    "tokens[..., :len(image)].mean(1), tokens[..., :len(image)]": "16 tokens of width 2",
    "tokens.mean(1).long(), tokens.long()": "gives cls as int64, strided",
    "tokens.mean(1).to_sparse(), tokens": "gives cls as float32, sparse_coo",
    "tokens.mean(1), tokens.to('meta')": "gives patch on meta for images on cpu",
    "tokens.mean(1), tokens.clone().requires_grad_()": "gives patch that requires grad",
    "[][len(image)], tokens": "fails on a batch of 2 images of 32 px: IndexError: list index",
}
BAD_ATTRIBUTES = {
    "mean = 0.5": "mean must be three numbers, got 0.5",
    "std = (0.5,)": "std must be three numbers, got (0.5,)",
    "mean = 'grey'": "mean must be three numbers, got 'grey'",
    "mean = None": "does not say its mean",
    "std = torch.ones(2, 2)": "std must be three numbers",
    "mean = (123.675, 116.28, 103.53)": "teachers.t.mean must be in [0, 1] (images are divided by",
    "std = (58.395, 57.12, 57.375)": "teachers.t.std must be in (0, 1]",
    "std = (0.5, 0.5, 0)": "teachers.t.std must be in (0, 1]",
    "mean = (float('nan'),) * 3": "teachers.t.mean must be in [0, 1]",
    "patch_size = '8'": "patch_size must be pixels or a pair of equal sides, got '8'",
    "patch_size = (8, 16)": "patch_size must be pixels or a pair of equal sides, got (8, 16)",
    "image_size = 32.5": "set teachers.t.size",
    "image_size = -32": "set teachers.t.size",
}
FAILING = {
    "{}['no']": "failing_0:make() fails: KeyError: 'no'",
    "None": "failing_1:make must return a torch module, got NoneType",
    "torch": "failing_2:make must return a torch module, got module",
}


@pytest.mark.parametrize(
    ("result", "attributes", "words"),
    [(result, SAID, words) for result, words in BAD_OUTPUT.items()]
    + [("tokens.mean(1), tokens", f"{SAID}; {a}", words) for a, words in BAD_ATTRIBUTES.items()],
)
def test_python_teachers_are_refused_by_one_sentence(
    tmp_path, monkeypatch, result, attributes, words
):
    """The same one where a run is planned or checked and where it starts."""
    name = f"edges_{abs(hash((result, attributes)))}"
    row = user_row(tmp_path, monkeypatch, name, attributes, result)
    for start in (
        lambda: sources.outline(row, grid=GRID),
        lambda: load(row, grid=GRID, device=CPU),
    ):
        with pytest.raises(ValueError) as error:
            start()
        assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_a_python_source_that_fails_says_whose_failure_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for number, (made, words) in enumerate(FAILING.items()):
        name = f"failing_{number}"
        (tmp_path / f"{name}.py").write_text(f"import torch\ndef make(): return {made}\n")
        row = config.Teacher(name="t", source=f"python:{name}:make")
        with pytest.raises(ValueError, match=re.escape(f"teacher 't': {words}")) as error:
            sources.outline(row, grid=GRID)
        assert f"({name}.py, line 2)" in str(error.value) or "fails" not in words
    (tmp_path / "unfinished.py").write_text("def make(:\n")
    with pytest.raises(ValueError, match="importing 'unfinished' fails: SyntaxError") as error:
        sources.outline(config.Teacher(name="t", source="python:unfinished:make"), grid=GRID)
    assert isinstance(error.value.__cause__, SyntaxError)  # its traceback is not lost


@pytest.mark.parametrize("value", ["torch.tensor([0.5] * 3)", "torch.full((3, 1, 1), 0.5).numpy()"])
def test_three_numbers_may_stand_in_any_container(tmp_path, monkeypatch, value):
    said = f"image_size, mean, std = (32, 32), {value}, [0.5, 0.5, 0.5]"
    row = user_row(tmp_path, monkeypatch, f"held_{len(value)}", said, "tokens.mean(1), tokens")
    made = sources.outline(row, grid=GRID)
    assert (made.size, made.mean, made.std) == (32, (0.5,) * 3, (0.5,) * 3)
    assert sources.outline(replace(row, mean=(0.1, 0.2, 0.3)), grid=GRID).tower.summary == "token"


def test_planning_with_a_python_teacher_draws_no_random_numbers(tmp_path, monkeypatch):
    row = user_row(tmp_path, monkeypatch, "drawing", SAID, "tokens.mean(1), tokens")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    sources.outline(row, grid=GRID)
    assert torch.equal(torch.get_rng_state(), before)


CLIP = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1},
}
VIT = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
COCA = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1, "dim_head": 16}
TOWERS = {
    "tiny-vit": (VIT, "token"),
    "tiny-clipa": (
        VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "mean of patches, normed",
    ),
    "tiny-coca": (VIT | {"attentional_pool": True, "attn_pooler_heads": 2}, "attention pool"),
    "tiny-trunk": (
        {"image_size": 64, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"},
        "token",
    ),
    "tiny-siglip": (
        {"image_size": 64, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
        "attention pool",
    ),
    "tiny-pe": (
        {"image_size": 64, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": None},
        "attention pool",
    ),
    "tiny-resnet": (
        {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32},
        "attention pool",
    ),
}


def project(visual: torch.nn.Module, projection: Tensor | None, cls_BC: Tensor) -> Tensor:
    """The image embedding that a tower's own projection makes of a summary."""
    if projection is not None:
        return cls_BC[:, : len(projection)] @ projection
    if hasattr(visual, "trunk"):
        return visual.head(visual.trunk.head(cls_BC))
    return cls_BC


@pytest.mark.parametrize("name", TOWERS)
def test_the_summary_is_what_open_clip_projects_to_the_text_space(name, tmp_path):
    vision, kind = TOWERS[name]
    more = {"multimodal_cfg": COCA} if "coca" in name else {}
    more |= {"custom_text": True} if name != "tiny-vit" else {}
    (tmp_path / f"{name}.json").write_text(json.dumps(CLIP | more | {"vision_cfg": vision}))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    row = config.Teacher(name="t", source=f"open_clip:{name}/random", precision="fp32")
    size = open_clip_source.image_size(row, GRID, vision)
    torch.manual_seed(0)
    model = open_clip.create_model(name, force_image_size=size).eval()
    visual = model.visual
    for value in visual.parameters():  # affine parts too, so that a forgotten norm shows
        torch.nn.init.normal_(value, 0.0 if value.ndim > 1 else 1.0, 0.1)
    normal = Normalise(*(tuple(visual.preprocess_cfg[k]) for k in ("mean", "std")))
    image_B3HW = normal(images(size), torch.float32)
    with torch.no_grad():
        truth = visual(image_B3HW)
    truth_BC = truth[0] if isinstance(truth, tuple) else truth
    projection, pool = getattr(visual, "proj", None), getattr(visual, "attnpool", None)
    teacher = Teacher(row, open_clip_source.visual_tower(row, size, model), grid=GRID, device=CPU)
    tokens = teacher(images(size))
    assert tokens.patch_BNC.shape == (3, GRID * GRID, teacher.width)
    assert (teacher.size, teacher.summary) == (64, kind)
    ours_BC = pool.c_proj(tokens.cls_BC) if pool else project(visual, projection, tokens.cls_BC)
    torch.testing.assert_close(ours_BC, truth_BC, rtol=1e-4, atol=1e-4)
    assert teacher.own_grid == (2 if pool else GRID)


def test_a_clip_tower_may_stay_at_its_native_side(tmp_path):
    """Its map is resampled to the student's grid, where by default its image would be."""
    (tmp_path / "native-vit.json").write_text(json.dumps(CLIP | {"vision_cfg": VIT}))
    open_clip.add_model_config(tmp_path / "native-vit.json")
    row = config.Teacher(name="t", source="open_clip:native-vit/random", precision="fp32", size=96)
    size = open_clip_source.image_size(row, GRID, VIT)
    model = open_clip.create_model("native-vit", force_image_size=size)
    teacher = Teacher(row, open_clip_source.visual_tower(row, size, model), grid=GRID, device=CPU)
    assert (teacher.size, teacher.own_grid, teacher.grid) == (96, 6, GRID)
    own, given = teacher.on_own_grid(images(96)), teacher(images(96))
    map_BCHW = own.patch_BNC.transpose(1, 2).unflatten(2, (6, 6))
    map_BCHW = torch.nn.functional.interpolate(
        map_BCHW, (GRID,) * 2, mode="bicubic", antialias=True
    )
    torch.testing.assert_close(given.patch_BNC, map_BCHW.flatten(2).transpose(1, 2))
    assert torch.equal(own.cls_BC, given.cls_BC)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory) -> config.Teacher:
    """A tiny ViT with an attention pool, whose summary was the mean of its patches before."""
    path = tmp_path_factory.mktemp("pooled") / "vit3.safetensors"
    save_file(random_model("test_vit3").state_dict(), path)
    return row_of(path, "test_vit3")


def test_a_cache_of_another_summary_or_side_is_refused(pooled, vit, tmp_path):
    rows = (pooled, replace(vit[1], name="plain", size=0))
    teachers = {
        row.name: load(row, grid=GRID, device=CPU).facts() | cache.own_facts(row) for row in rows
    }
    draws = {"grid": GRID}
    manifest = {"format": 1, "whole": True, "seed": 0, "views": 1, "dtype": "bf16", "samples": 1}
    manifest |= {"tokens": GRID**2, "chunk": 128, "draws": draws, "teachers": teachers}

    for row in rows:
        width = teachers[row.name]["width"]
        tokens = Tokens(torch.zeros(1, width), torch.zeros(1, GRID**2, width))
        cache.layout_of(tmp_path, manifest).write(row.name, 0, range(1), [tokens])

    def opened() -> dict[str, str]:
        (tmp_path / cache.MANIFEST).write_text(json.dumps(manifest))
        facts = cache.FeatureCache(str(tmp_path), rows, draws, samples=1).facts
        return {name: row["cls"] for name, row in facts.items()}

    assert opened() == {"t": "attention pool", "plain": "token"}
    for key, value in {"cls": "mean of patches", "size": 4}.items():
        good, teachers["t"][key] = teachers["t"][key], value
        with pytest.raises(
            ValueError, match=rf"\(t\) was made with {key} '?{value}'?, this run has"
        ):
            opened()
        teachers["t"][key] = good


@pytest.mark.lengthy
@pytest.mark.slow
@DEMONSTRATION
def test_a_checkpoint_of_another_summary_is_not_resumed(pooled, tmp_path):
    """As a version left it that knew no attention pools, and as one that says its kinds."""
    more = LOST | {"teachers": f"t={pooled.source}", "eval__on": "false", "optim__steps": 2}
    run(alone(tmp_path, **more, run__stop_at=1))
    step = tmp_path / "checkpoints" / "step_0000001"
    facts = json.loads((step / "run.json").read_text())
    assert facts["summaries"] == {"t": "attention pool"}
    kinds = {"mean of patches": {"summaries": {"t": "mean of patches"}}, "or the mean of": {}}
    for words, said in kinds.items():
        del facts["summaries"]
        facts |= said
        (step / "run.json").write_text(json.dumps(facts))
        hashes = json.loads((step / "manifest.json").read_text())
        data = (step / "run.json").read_bytes()
        hashes["run.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (step / "manifest.json").write_text(json.dumps(hashes))
        printed = run(alone(tmp_path, **more), code=2)
        assert "another CLS target of teacher 't'" in printed and words in printed
        assert "this run has attention pool" in printed


def test_checkpoints_of_before_go_on_where_the_summary_is_what_it_was():
    run_dir.refuse_other_summaries(
        "c", {}, {"a": {"cls": "token"}, "b": {"cls": "mean of patches"}}
    )
    with pytest.raises(ValueError, match="teacher 'p': its CLS token or the mean of its patches"):
        run_dir.refuse_other_summaries("c", {}, {"p": {"cls": "attention pool"}})


OFFLINE = """
import json, sys, torch
from unic_ds import config
from unic_ds.teachers import sources
from unic_ds.teachers.teacher import load
found = {}
for source in sys.argv[1:]:
    row = config.Teacher(name="t", source=source, precision="fp32")
    try:
        teacher = load(row, grid=4, device=torch.device("cpu"))
    except ValueError as exc:
        found[source] = str(exc)
        continue
    ramp = torch.arange(3 * teacher.size**2).remainder(251).to(torch.uint8)
    tokens = teacher(ramp.view(1, 3, teacher.size, teacher.size))
    found[source] = [teacher.size, tokens.cls_BC[0, :8].tolist(), sources.fetch(row)]
print(json.dumps(found))
"""


def hub_file(home: Path, repo: str, name: str, state: dict[str, Tensor]) -> None:
    """Put weights where the hub's own client keeps what it downloaded."""
    cache = home / "hub" / f"models--{repo.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, cache / "snapshots" / ("0" * 40) / name, metadata={"format": "pt"})


def test_hub_weights_are_found_offline(tmp_path):
    """Random weights in the hub's layout: compute nodes reach no hub."""
    vit = random_model("test_vit")
    hub_file(tmp_path, "timm/test_vit.r160_in1k", "model.safetensors", vit.state_dict())
    torch.manual_seed(0)
    clip = open_clip.create_model("MobileCLIP2-S0")
    hub_file(
        tmp_path, "timm/MobileCLIP2-S0-OpenCLIP", "open_clip_model.safetensors", clip.state_dict()
    )
    there = ["timm:test_vit.r160_in1k", "open_clip:MobileCLIP2-S0/dfndr2b"]
    missing = ["timm:test_convnext", "open_clip:ViT-H-14-quickgelu/metaclip_fullcc"]
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, *there, *missing],
        env={k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        | offline
        | {"PYTHONPATH": PATH_HERE},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(ran.stdout)
    size, cls, facts = found[there[0]]
    ramp = torch.arange(3 * size**2).remainder(251).to(torch.uint8).view(1, 3, size, size)
    vit.set_input_size(size)
    assert size == 64
    assert cls == pytest.approx(expected(vit, ramp)[0, 0, :8].tolist(), abs=1e-3)
    assert len(facts["sha256"]) == 64 and facts["bytes"] == Path(facts["path"]).stat().st_size
    assert found[there[1]][0] == 256
    for source in missing:
        assert "unic-ds teachers fetch --recipe R" in found[source]


@pytest.fixture(scope="module")
def pair(vit, tmp_path_factory) -> tuple[config.Teacher, ...]:
    """A ViT and a CNN with random weights, in that order."""
    path = tmp_path_factory.mktemp("pair") / "cnn.safetensors"
    save_file(random_model("test_efficientnet", 1).state_dict(), path)
    return replace(vit[1], name="vit", size=0), row_of(path, "test_efficientnet", name="cnn")


def make_teacher_set(rows: tuple[config.Teacher, ...], **keys) -> teacher_set.TeacherSet:
    return teacher_set.TeacherSet(
        rows, grid=GRID, standardise=config.Standardise(**keys), device=CPU
    )


def test_teacher_set_keeps_config_order_and_standardises(pair):
    teachers = make_teacher_set(pair, target_clamp=0.0, std_floor=0.0)
    batch = {size: images(size, 6) for size in teachers.sizes}
    assert teachers.sizes == (64, 160)
    assert list(teachers.widths) == ["vit", "cnn"]
    raw, first = teachers.features(batch), targets(teachers, batch)
    assert list(first) == ["vit", "cnn"]
    torch.testing.assert_close(first["cnn"].patch_BNC, raw["cnn"].patch_BNC, rtol=1e-5, atol=1e-5)
    teachers.track(1.0)
    patch_BN_C = targets(teachers, batch)["vit"].patch_BNC.flatten(0, 1)
    assert patch_BN_C.mean(0).abs().max() < 1e-4
    assert (patch_BN_C.std(0) - 1).abs().max() < 1e-3


def targets(teachers: teacher_set.TeacherSet, batch: dict[int, torch.Tensor]) -> dict[str, Tokens]:
    """Standardised targets of a batch."""
    return {name: target.standardised() for name, target in teachers(batch).items()}


def test_validation_leaves_no_trace(pair):
    teachers = make_teacher_set(pair)
    teachers({size: images(size) for size in teachers.sizes}, observe=False)
    assert all(norm.moments().abs().sum() == 0 for norm in teachers.norms.values())


def test_pool_state_is_the_statistics_alone(pair, tmp_path):
    teachers, fresh = make_teacher_set(pair), make_teacher_set(pair)
    batch = {size: images(size) for size in teachers.sizes}
    teachers(batch)
    teachers.track(1.0)
    torch.save(teachers.state_dict(), tmp_path / "teachers.pt")
    fresh.load_state_dict(torch.load(tmp_path / "teachers.pt", weights_only=True))
    again = targets(fresh, batch)
    for name, tokens in targets(teachers, batch).items():
        assert torch.equal(again[name].patch_BNC, tokens.patch_BNC)
    statistics = sum(value.numel() for value in teachers.state_dict().values())
    assert statistics == 4 * sum(teachers.widths.values())
    with pytest.raises(ValueError, match="this run's teachers are vit"):
        make_teacher_set(pair[:1]).load_state_dict(teachers.state_dict())


def test_manifest_and_check_are_plain_values(pair):
    manifest = make_teacher_set(pair).manifest()
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["cnn"]["cls"] == "mean of patches"
    rows = teacher_set.describe(pair, grid=GRID, device=CPU)
    assert [row["name"] for row in rows] == ["vit", "cnn"]
    assert all(row["finite"] and row["patch_shape"][1] == GRID * GRID for row in rows)
    assert rows[0]["sha256"] == manifest["vit"]["sha256"]


def test_missing_weights_stop_the_set_before_anything_is_read(pair, tmp_path):
    with pytest.raises(ValueError, match="fetch"):
        make_teacher_set((*pair, row_of(tmp_path / "no.pth", "test_vit")))
    with pytest.raises(ValueError, match="no teachers"):
        make_teacher_set(())


RANKS = """
import sys, torch
from unic_ds import config, dist
from unic_ds.teachers.teacher_set import TeacherSet
dist.start()
path, arch, images, out = sys.argv[1:]
row = config.Teacher(name="t", source=f"file:{path}#arch={arch}", precision="fp32")
cfg = config.Standardise()
teachers = TeacherSet((row,), grid=4, standardise=cfg, device=torch.device("cpu"))
mine = torch.load(images, weights_only=True).chunk(dist.world())[dist.rank()]
for micro in mine.chunk(2):
    teachers({64: micro})
teachers.track(0.5)
torch.save(teachers.state_dict(), f"{out}.{dist.rank()}")
dist.stop()
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.dist
def test_two_ranks_track_as_one(vit, tmp_path):
    torch.save(images(64, 8), tmp_path / "images.pt")
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    args = [str(sources.locate(vit[1])), "test_vit", str(tmp_path / "images.pt")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, *args, str(tmp_path / "state")],
            env=os.environ
            | launch
            | {"RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": PATH_HERE},
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    alone = make_teacher_set((replace(vit[1], size=0),))
    alone({64: images(64, 8)})
    alone.track(0.5)
    states = [torch.load(tmp_path / f"state.{r}", weights_only=True) for r in range(2)]
    for name, value in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_never_waits_for_the_gpu(pair):
    device = torch.device("cuda")
    teachers = teacher_set.TeacherSet(
        pair, grid=GRID, standardise=config.Standardise(), device=device
    )
    batch = {size: images(size).to(device) for size in teachers.sizes}
    teachers(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        teachers(batch)
        teachers.track(0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(
    bool(demo.missing_packages()), reason="the demonstration's packages are not installed"
)
def test_real_teachers(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIC_DS_CACHE", str(tmp_path))
    from unic_ds.demo import conversion  # which imports onnx

    efficientnet, dinov2 = tmp_path / "e.safetensors", tmp_path / "d.safetensors"
    conversion.write_weights(efficientnet, conversion.efficientnet_lite0(), "Apache-2.0", "package")
    conversion.write_weights(dinov2, conversion.dinov2_s14(), "MIT", "package")
    rows = (
        row_of(
            efficientnet,
            "tf_efficientnet_lite0",
            name="e",
            size=128,
            precision="bf16",
            channels_last=True,
        ),
        row_of(dinov2, "vit_small_patch14_dinov2", name="d", block="10", precision="bf16"),
    )
    e, d = teacher_set.describe(rows, grid=7, device=CPU)
    assert (e["size"], e["width"], e["tokens"], e["mean"]) == (128, 1280, 16, [0.5, 0.5, 0.5])
    assert (d["size"], d["width"], d["tokens"], d["patch"]) == (98, 384, 49, 14)
    assert e["finite"] and d["finite"]
