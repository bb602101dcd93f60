"""Teachers of every kind: built from files and caches on disk, run, standardised, refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from unic_ds import config, quickstart
from unic_ds.teachers import pool, sources, weights
from unic_ds.teachers.teacher import Teacher, load
from unic_ds.tokens import Normalise, Tokens

CPU = torch.device("cpu")
GRID = 4
ROOT = Path(__file__).resolve().parents[1]


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
    assert facts["sha256"] == weights.facts(vit[1])["sha256"]


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
        "put them there or set its source (`unic-ds teachers fetch` has those of hubs)",
    )


def test_half_a_file_is_refused(vit, tmp_path):
    state = {k: v for k, v in vit[0].state_dict().items() if "blocks.5" not in k}
    save_file(state, tmp_path / "half.safetensors")
    refused(row_of(tmp_path / "half.safetensors", "test_vit"), "do not fit test_vit", "blocks.5")
    path = weights.file_path(vit[1])
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


def test_python_teacher_must_say_what_it_wants(tmp_path, monkeypatch):
    row = user_row(tmp_path, monkeypatch, "edges_b", "patch_size = 8", "tokens.mean(1), tokens")
    refused(row, "does not say its mean", "teachers.t.mean")
    mute = user_row(tmp_path, monkeypatch, "edges_c", "image_size = 32", "tokens")
    given = replace(mute, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    refused(given, "Tokens(cls, patch)")
    ragged = user_row(
        tmp_path, monkeypatch, "edges_d", "image_size = 32", "tokens.mean(1), tokens[:, 1:]"
    )
    refused(replace(ragged, mean=given.mean, std=given.std), "(1, 15, 8)", "square")


CLIP = {
    "embed_dim": 16,
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1},
}
TOWERS = {
    "tiny-vit": {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16},
    "tiny-trunk": {
        "image_size": 64,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "token",
    },
    "tiny-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32},
}


@pytest.mark.parametrize("name", TOWERS)
def test_open_clip_towers(name, tmp_path):
    (tmp_path / f"{name}.json").write_text(json.dumps(CLIP | {"vision_cfg": TOWERS[name]}))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    row = config.Teacher(name="t", source=f"open_clip:{name}/random", precision="fp32")
    size = sources.clip_size(row, GRID, TOWERS[name])
    model = open_clip.create_model(name, force_image_size=size).eval()
    visual = model.visual
    normal = Normalise(*(tuple(visual.preprocess_cfg[k]) for k in ("mean", "std")))
    image_B3HW = normal(images(size), torch.float32)
    with torch.no_grad():
        truth_BC = visual(image_B3HW)
    projection = getattr(visual, "proj", None)
    teacher = Teacher(row, sources.clip_source(row, size, model), grid=GRID, device=CPU)
    tokens = teacher(images(size))
    assert tokens.patch_BNC.shape == (3, GRID * GRID, teacher.width)
    if name == "tiny-vit":
        assert (teacher.size, teacher.width, teacher.has_cls) == (64, 64, True)
        torch.testing.assert_close(tokens.cls_BC @ projection, truth_BC, rtol=1e-4, atol=1e-5)
    elif name == "tiny-trunk":
        torch.testing.assert_close(visual.head(tokens.cls_BC), truth_BC, rtol=1e-4, atol=1e-5)
    else:
        assert (teacher.own_grid, teacher.has_cls) == (2, False)


OFFLINE = """
import json, sys, torch
from unic_ds import config
from unic_ds.teachers import weights
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
    found[source] = [teacher.size, tokens.cls_BC[0, :8].tolist(), weights.fetch(row)]
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
        | {"PYTHONPATH": str(ROOT)},
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


def make_pool(rows: tuple[config.Teacher, ...], **keys) -> pool.Teachers:
    return pool.Teachers(rows, grid=GRID, standardise=config.Standardise(**keys), device=CPU)


def test_pool_keeps_config_order_and_standardises(pair):
    teachers = make_pool(pair, target_clamp=0.0, std_floor=0.0)
    batch = {size: images(size, 6) for size in teachers.sizes}
    assert teachers.sizes == (64, 160)
    assert list(teachers.widths) == ["vit", "cnn"]
    raw, first = teachers.raw(batch), targets(teachers, batch)
    assert list(first) == ["vit", "cnn"]
    torch.testing.assert_close(first["cnn"].patch_BNC, raw["cnn"].patch_BNC, rtol=1e-5, atol=1e-5)
    teachers.track(1.0)
    patch_BN_C = targets(teachers, batch)["vit"].patch_BNC.flatten(0, 1)
    assert patch_BN_C.mean(0).abs().max() < 1e-4
    assert (patch_BN_C.std(0) - 1).abs().max() < 1e-3


def targets(teachers: pool.Teachers, batch: dict[int, torch.Tensor]) -> dict[str, Tokens]:
    """Standardised targets of a batch."""
    return {name: target.standardised() for name, target in teachers(batch).items()}


def test_validation_leaves_no_trace(pair):
    teachers = make_pool(pair)
    teachers({size: images(size) for size in teachers.sizes}, observe=False)
    assert all(norm.moments().abs().sum() == 0 for norm in teachers.norms.values())


def test_pool_state_is_the_statistics_alone(pair, tmp_path):
    teachers, fresh = make_pool(pair), make_pool(pair)
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
        make_pool(pair[:1]).load_state_dict(teachers.state_dict())


def test_manifest_and_check_are_plain_values(pair):
    manifest = make_pool(pair).manifest()
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["cnn"]["cls"] == "mean of patches"
    rows = pool.describe(pair, grid=GRID, device=CPU)
    assert [row["name"] for row in rows] == ["vit", "cnn"]
    assert all(row["finite"] and row["patch_shape"][1] == GRID * GRID for row in rows)
    assert rows[0]["sha256"] == manifest["vit"]["sha256"]


def test_missing_weights_stop_the_pool_before_anything_is_read(pair, tmp_path):
    with pytest.raises(ValueError, match="fetch"):
        make_pool((*pair, row_of(tmp_path / "no.pth", "test_vit")))
    with pytest.raises(ValueError, match="no teachers"):
        make_pool(())


RANKS = """
import sys, torch
from unic_ds import config, dist
from unic_ds.teachers import pool
dist.start()
path, arch, images, out = sys.argv[1:]
row = config.Teacher(name="t", source=f"file:{path}#arch={arch}", precision="fp32")
cfg = config.Standardise()
teachers = pool.Teachers((row,), grid=4, standardise=cfg, device=torch.device("cpu"))
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
    args = [str(weights.file_path(vit[1])), "test_vit", str(tmp_path / "images.pt")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, *args, str(tmp_path / "state")],
            env=os.environ
            | launch
            | {"RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": str(ROOT)},
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    alone = make_pool((replace(vit[1], size=0),))
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
    teachers = pool.Teachers(pair, grid=GRID, standardise=config.Standardise(), device=device)
    batch = {size: images(size).to(device) for size in teachers.sizes}
    teachers(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        teachers(batch)
        teachers.track(0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(
    bool(quickstart.missing_packages()), reason="the demonstration's packages are not installed"
)
def test_real_teachers(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIC_DS_CACHE", str(tmp_path))
    efficientnet, dinov2 = tmp_path / "e.safetensors", tmp_path / "d.safetensors"
    quickstart.write_weights(efficientnet, quickstart.efficientnet_lite0(), "Apache-2.0", "package")
    quickstart.write_weights(dinov2, quickstart.dinov2_s14(), "MIT", "package")
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
    e, d = pool.describe(rows, grid=7, device=CPU)
    assert (e["size"], e["width"], e["tokens"], e["mean"]) == (128, 1280, 16, [0.5, 0.5, 0.5])
    assert (d["size"], d["width"], d["tokens"], d["patch"]) == (98, 384, 49, 14)
    assert e["finite"] and d["finite"]
