"""Resizing so that the grids agree: of the image, of the teacher's map, or of the smaller map."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from forked import Forked
from pictures import folder
from runs import TRAIN, curve, run, tiny, verb
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from unic_ds import config
from unic_ds.losses.balance import Balancer
from unic_ds.losses.distill import distill_loss
from unic_ds.planning import trace
from unic_ds.teachers import cache, sources
from unic_ds.teachers.teacher import Teacher, load
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import Target, Tokens, enlarged
from unic_ds.training.checkpoint import defaults_for
from unic_ds.training.setup import map_clause
from unic_kernels.ops import KERNELS

CPU = torch.device("cpu")
OWN, GRID = 10, 4
"""Sides of the grids of the teacher at its native 160 px, and of the student."""


def images(side: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def bicubic(patch_BNC: Tensor, side: int) -> Tensor:
    """torch's own resizing of a square map of tokens."""
    own = round(patch_BNC.shape[1] ** 0.5)
    map_BCHW = patch_BNC.transpose(1, 2).unflatten(2, (own, own))
    found = F.interpolate(map_BCHW, size=(side, side), mode="bicubic", antialias=True)
    return found.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> config.Teacher:
    """A CLIP-like ViT with patches of 16 px and position embeddings of 160 px."""
    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    for value in model.parameters():
        torch.nn.init.normal_(value, 0.0 if value.ndim > 1 else 1.0, 0.1)
    save_file(model.state_dict(), file)
    return config.Teacher(name="t", source=f"file:{file}#arch=test_vit", precision="fp32")


def loaded(row: config.Teacher, resize: str, grid: int = GRID, **keys: Any) -> Teacher:
    return load(replace(row, **{"resize": resize} | keys), grid=grid, device=CPU)


def test_the_image_is_resized_by_default(row: config.Teacher) -> None:
    teacher = loaded(row, "image")
    assert row.resize == "image"
    assert (teacher.size, teacher.own_grid, teacher.target_grid) == (16 * GRID, GRID, GRID)


@pytest.mark.parametrize("grid", [GRID, 12])
def test_a_native_map_is_resized_to_the_student_s_grid(row: config.Teacher, grid: int) -> None:
    """Smaller with antialiasing, larger by plain bicubic; the CLS token is the tower's own."""
    teacher = loaded(row, "target", grid)
    assert (teacher.size, teacher.own_grid, teacher.target_grid) == (160, OWN, grid)
    own, found = teacher.on_own_grid(images(160)), teacher(images(160))
    assert torch.equal(found.cls_BC, own.cls_BC)
    torch.testing.assert_close(found.patch_BNC, bicubic(own.patch_BNC, grid))
    facts = teacher.facts()
    assert (facts["size"], facts["tokens"], facts["grid"]) == (160, OWN**2, grid)
    plain = loaded(row, "image", grid)(images(16 * grid))
    assert (plain.patch_BNC - found.patch_BNC).abs().max() > 0.1  # another target


@pytest.mark.parametrize(("grid", "target"), [(GRID, OWN), (12, 12)])
def test_the_larger_grid_is_the_target_s(row: config.Teacher, grid: int, target: int) -> None:
    teacher = loaded(row, "larger", grid)
    assert (teacher.size, teacher.target_grid, teacher.facts()["grid"]) == (160, target, target)
    own, found = teacher.on_own_grid(images(160)), teacher(images(160))
    torch.testing.assert_close(found.patch_BNC, bicubic(own.patch_BNC, target))
    line = map_clause(teacher.facts(), grid)
    assert ("the student's 4 x 4 map" in line) == (target == OWN), line
    assert map_clause(loaded(row, "image").facts(), GRID) == ""


def test_a_size_that_is_given_counts_and_must_fit(row: config.Teacher) -> None:
    teacher = loaded(row, "target", size=96)
    assert (teacher.size, teacher.own_grid, teacher.target_grid) == (96, 6, GRID)
    for start in (load, sources.outline):
        more: dict[str, Any] = {"device": CPU} if start is load else {}
        with pytest.raises(ValueError, match=r"teachers\.t\.size must be a multiple of its patch"):
            start(replace(row, resize="target", size=100), grid=GRID, **more)
        with pytest.raises(ValueError, match=r"multiple of its patch 14, got 160"):
            start(replace(row, resize="larger", patch=14), grid=GRID, **more)


@pytest.mark.parametrize(
    ("source", "side", "tokens"),
    [
        ("open_clip:ViT-B-32/openai", 224, 49),
        ("timm:naflexvit_base_patch16_siglip", 384, 576),
        ("timm:swin_tiny_patch4_window7_224", 224, 49),
        ("timm:convit_tiny", 224, 196),  # takes no other side: so under `image` too
        ("python:small_teacher:wide", 32, 4),
    ],
)
def test_every_kind_of_source_knows_its_native_side(source: str, side: int, tokens: int) -> None:
    for resize in ("target", "larger"):
        row = config.Teacher(name="t", source=source, resize=resize)
        cost = trace.teacher_cost(row, GRID, 1)
        larger = max(tokens, GRID**2) if resize == "larger" else GRID**2
        assert (cost.size, cost.grid**2) == (side, larger)


@pytest.mark.parametrize("leading", [(), (3,)])
def test_predictions_are_resized_as_torch_does(leading: tuple[int, ...]) -> None:
    """Forward and backward, also along an axis of rungs."""
    torch.manual_seed(0)
    patch = torch.randn(*leading, 2, 16, 5, requires_grad=True)
    other = patch.detach().clone().requires_grad_()
    found = enlarged(patch, 7)
    want = bicubic(other.reshape(-1, 16, 5), 7).view(*leading, 2, 49, 5)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(found)
    for x in (found, want):
        x.backward(grad)
    torch.testing.assert_close(patch.grad, other.grad, rtol=1e-5, atol=1e-5)


def random_tokens(grid: int, width: int, leading: tuple[int, ...] = ()) -> Tokens:
    return Tokens(torch.randn(*leading, 5, width), torch.randn(*leading, 5, grid**2, width))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("rungs", [0, 2])
def test_the_distance_is_taken_on_the_larger_grid(kernels: str, rungs: int) -> None:
    """Teachers on three grids, one of CLS tokens alone: each loss is that of the teacher alone."""
    torch.manual_seed(1)
    leading = (rungs,) if rungs else ()
    widths, grids = {"a": 6, "b": 8, "c": 5, "d": 7}, {"a": 4, "b": 2, "c": 9, "d": 4}
    pred = {name: random_tokens(2, width, leading) for name, width in widths.items()}
    for tokens in pred.values():
        for x in tokens:
            x.requires_grad_()
    target = {name: Target.of(random_tokens(grids[name], widths[name])) for name in widths}
    alone = config.Distance({"cosine": 1.0}, {})
    shared: dict[str, Any] = {"loss": config.Loss(), "ops": KERNELS[kernels]}
    found, metrics = distill_loss(
        pred,
        target,
        torch.ones(4, 5),
        balance=Balancer(torch.ones(4)),
        distances={"c": alone},
        **shared,
    )
    found.backward()
    grads = {name: [x.grad for x in tokens] for name, tokens in pred.items()}
    assert grads["c"][1] is None
    for name, tokens in pred.items():
        side = grids[name]
        flat = tokens.patch_BNC.detach().reshape(-1, 4, widths[name]).requires_grad_()
        cls = tokens.cls_BC.detach().requires_grad_()
        patch = bicubic(flat, side).view(*leading, 5, side**2, widths[name])
        own = {name: Tokens(cls, tokens.patch_BNC if name == "c" else patch)}
        single, values = distill_loss(
            own,
            {name: target[name]},
            torch.ones(1, 5),
            balance=Balancer(torch.ones(1)),
            distances={"c": alone},
            **shared,
        )
        image_loss = metrics[f"{name}/image_loss"]
        torch.testing.assert_close(image_loss, values[f"{name}/image_loss"], rtol=1e-5, atol=1e-6)
        single.backward()
        wanted = [cls.grad] if name == "c" else [cls.grad, flat.grad]
        for got, want in zip(grads[name], wanted, strict=False):
            assert got is not None and want is not None
            torch.testing.assert_close(got.flatten(), want.flatten() / 4, rtol=1e-4, atol=1e-7)


def test_a_plan_knows_the_size_and_the_grid(row: config.Teacher) -> None:
    student = config.Student(model="test_vit", size=64)
    traces = {}
    for resize in ("image", "target", "larger"):
        rows = (replace(row, resize=resize), replace(row, name="u"))
        cfg = config.Config(teachers=rows, student=student, ladder=config.Ladder(width=16))
        traces[resize] = trace.trace(cfg, 3, bf16=False)
        teachers = TeacherSet(rows, grid=GRID, standardise=config.Standardise(), device=CPU)
        tokens = teachers.features({side: images(side, 3) for side in teachers.sizes})
        real = sum(x.nbytes for pair in tokens.values() for x in pair)
        sides = (64,) if resize == "image" else (64, 160)
        assert (traces[resize].targets, teachers.sizes) == (real, sides)
        assert traces[resize].features * 3 * 4 == real  # three images in fp32
    image, target, larger = (traces[resize].flops["teacher t"] for resize in traces)
    assert target == larger > 5 * image
    kept = [found.kept["ladder and loss"] for found in traces.values()]
    assert kept[0] == kept[1] < kept[2]
    assert 160 in traces["target"].sizes and 160 not in traces["image"].sizes


def test_a_checkpoint_of_an_older_version_has_the_default() -> None:
    found = defaults_for("a,b")
    assert found["--teachers.a.resize"] == found["--teachers.b.resize"] == "image"
    assert "--teachers.a.source" not in found and found["--optim.lr"] == "0.0003"


DRAWS = {"images": "x", "grid": 2}


def manifest(folder: Path, row: config.Teacher, **facts: Any) -> cache.FeatureCache:
    """Write a cache of one teacher without files, and open it as a run's."""
    theirs = {"width": 24, "size": 32, "source": row.source, "sha256": "f" * 64, "cls": "token"}
    own = cache.own_facts(config.Teacher(name="narrow", source=row.source))
    own.pop("teachers.narrow.resize")  # an older version's
    found = {
        **{"format": 1, "whole": True, "seed": 0, "views": 1, "samples": 1, "tokens": 4},
        **{"chunk": 128, "dtype": "bf16", "draws": DRAWS},
        "teachers": {"narrow": theirs | own | facts},
    }
    folder.mkdir(exist_ok=True)
    (folder / cache.MANIFEST).write_text(json.dumps(found))
    name = folder / "narrow" / "view_000_chunk_000000.bin"
    name.parent.mkdir(exist_ok=True)
    name.write_bytes(bytes(2 * 24 * (1 + facts.get("grid", 2) ** 2)))
    return cache.FeatureCache(str(folder), (row,), DRAWS, samples=1)


def test_a_cache_belongs_to_one_way_of_resizing(tmp_path: Path) -> None:
    row = config.Teacher(name="narrow", source="python:small_teacher:narrow")
    assert manifest(tmp_path / "c", row).layout.tokens_of("narrow") == 4
    larger = {"teachers.narrow.resize": '"larger"', "grid": 4}
    found = manifest(tmp_path / "c", replace(row, resize="larger"), **larger)
    assert (found.layout.tokens_of("narrow"), found.layout.total()) == (16, 2 * 24 * 17)
    with pytest.raises(ValueError, match=r"made with teachers\.narrow\.resize '\"image\"', this"):
        manifest(tmp_path / "c", replace(row, resize="larger"))
    with pytest.raises(ValueError, match=r"made with teachers\.narrow\.resize '\"larger\"', this"):
        manifest(tmp_path / "c", row, **larger)
    with pytest.raises(ValueError, match="narrow must have a grid of 1 to 1024"):
        manifest(tmp_path / "c", row, grid=-2)


@pytest.mark.dist
def test_ranks_and_stored_features_have_the_same_curve(tmp_path: Path) -> None:
    """One and two ranks, with a map reduced to the student's grid and with a larger target."""
    for side in ("train", "val"):
        folder(tmp_path / side, 16)
    native = {"teachers.narrow.size": 64, "teachers.narrow.resize": "target"}
    native |= {"teachers.wide.size": 64, "teachers.wide.resize": "larger", "run.save_every": 9}
    native |= {f"teachers.{name}.precision": "fp32" for name in ("narrow", "wide")}
    native |= {"eval.tasks": "knn,teacher", "data.augment": "none", "loss.divisor": "expected"}
    printed = run(Forked(1, [TRAIN, *tiny(tmp_path, "one", native)]))
    assert "wide: python:small_teacher:wide, 40 wide, 64 px; the student's 2 x 2 map is" in printed
    assert "24 wide, 64 px; its 4 x 4 map is resized to 2 x 2" in printed
    run(Forked(2, [TRAIN, *tiny(tmp_path, "two", native | {"eval.on": "false"})]))
    words = tiny(tmp_path, "x", native)
    at = words.index("--ds_config")
    del words[at : at + 2], words[words.index("--out") : words.index("--out") + 2]
    run(verb("cache", tmp_path / "features", "--views", "2", *words))
    stored = {"teachers.cache": tmp_path / "features", "eval.on": "false"}
    run(Forked(2, [TRAIN, *tiny(tmp_path, "stored", native | stored)]))
    one, two, cached = (curve(tmp_path / name) for name in ("one", "two", "stored"))
    assert list(one) == list(two) == list(cached) == [1, 2, 3]
    for step, values in one.items():
        for key in ("loss", "wide/patch_cosine", "narrow/patch_smooth_l1"):
            assert two[step][key] == pytest.approx(values[key], rel=1e-5), (step, key)
        if step < 3:  # epochs of two steps: the second view
            assert cached[step]["loss"] == pytest.approx(values["loss"], rel=5e-3), step
    facts = json.loads((tmp_path / "one" / "teachers.json").read_text())
    assert [facts[name]["grid"] for name in ("narrow", "wide")] == [2, 4]
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert any("wide patch fidelity" in key for key in results["student after"])
