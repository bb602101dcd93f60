"""Initial weights: encoder, ladder and statistics of a folder, or an encoder's file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unic_ds import config
from unic_ds.config import job
from unic_ds.models.encoder import grid_of
from unic_ds.models.ladder import Head, Ladder
from unic_ds.models.student import Student
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import from_map
from unic_ds.weights import warm_start
from unic_ds.weights.export import export

LADDER = config.Ladder(rungs="5,11", width=8, last_width=16)


class Net(nn.Module):
    """A teacher of six channels."""

    image_size, patch_size = 32, 16
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 16, 16)

    def forward(self, image_B3HW: torch.Tensor) -> Any:
        return from_map(self.patches(image_B3HW))


def pool(cfg: config.Student, *names: str) -> TeacherSet:
    rows = tuple(config.Teacher(name=n, source=f"python:{__name__}:Net") for n in names)
    return TeacherSet(
        rows, grid=grid_of(cfg), standardise=config.Standardise(), device=torch.device("cpu")
    )


def run(
    seed: int,
    *names: str,
    model: str = "vit_tiny_patch16_224",
    size: int = 32,
    ladder: config.Ladder = LADDER,
) -> tuple[config.Student, Student, TeacherSet]:
    """A student and its teachers as a run builds them; untrained weights differ by seed."""
    cfg = config.Student(model=model, size=size)
    teachers = pool(cfg, *(names or ("a", "b")))
    heads = {name: Head(width) for name, width in teachers.widths.items()}
    return cfg, Student(cfg, ladder, heads, seed=seed), teachers


def stir(module: nn.Module) -> None:
    """Weights that no initialisation gives, biases and norms included."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a run of ViT-Ti/16 at 32 px, with what it held."""
    cfg, student, teachers = run(0)
    torch.manual_seed(0)
    stir(student)
    for norm in teachers.norms.values():
        norm.mean_2C.normal_()
        norm.std_2C.uniform_(0.5, 2)
    return export(
        student.encoder.state_dict(),
        config.Config(student=cfg),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        tmp_path_factory.mktemp("run") / "student",
        extras={
            warm_start.LADDER: student.ladder.export_state_dict(),
            warm_start.STATISTICS: teachers.state_dict(),
        },
    )


def same(part: Any, file: Path) -> bool:
    """True if a part of a run has the file's tensors."""
    want = load_file(file)
    state = part.export_state_dict() if isinstance(part, Ladder) else part.state_dict()
    return state.keys() == want.keys() and all(torch.equal(state[k], want[k]) for k in want)


def test_a_run_takes_up_encoder_ladder_and_statistics(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, student, teachers = run(7)
    assert not same(student.encoder, folder / "model.safetensors")
    hashes = warm_start.start(str(folder), student, teachers)
    assert same(student.encoder, folder / "model.safetensors")
    assert same(student.ladder, folder / "ladder.safetensors")
    assert same(teachers, folder / "statistics.safetensors")
    assert hashes.keys() == {f"{k}.safetensors" for k in ("model", "ladder", "statistics")}
    assert all(row.keys() == {"sha256", "content"} for row in hashes.values())
    printed = capsys.readouterr().out
    assert f"starts from {folder}: encoder, ladder, statistics" in printed
    assert "not loaded" not in printed
    assert not student.encoder.norm.weight.requires_grad


def test_a_bare_file_starts_the_encoder_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(folder / "model.safetensors")
    classifier = {"head.weight": torch.ones(10, 192), "head.bias": torch.ones(10)}
    save_file(state | classifier, tmp_path / "vit.safetensors")
    _, student, teachers = run(7)
    ladder, statistics = (
        {k: v.clone() for k, v in p.state_dict().items()} for p in (student.ladder, teachers)
    )
    hashes = warm_start.start(str(tmp_path / "vit.safetensors"), student, teachers)
    assert list(hashes) == ["model.safetensors"]
    assert same(student.encoder, folder / "model.safetensors")
    for part, before in ((student.ladder, ladder), (teachers, statistics)):
        assert all(torch.equal(value, before[name]) for name, value in part.state_dict().items())
    printed = capsys.readouterr().out
    assert "the ladder is not loaded: " in printed and "the statistics are not loaded: " in printed


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ({"ladder": config.Ladder(rungs="11", width=8, last_width=16)}, {"the ladder"}),
        ({"ladder": config.Ladder(rungs="5,11", width=9, last_width=16)}, {"the ladder"}),
        ({"names": ("a",)}, {"the ladder", "the statistics"}),
        ({"names": ("a", "b", "c")}, {"the ladder", "the statistics"}),
        ({"names": ("b", "a")}, set()),
    ],
    ids=["rungs", "width", "fewer teachers", "more teachers", "another order"],
)
def test_another_ladder_or_teachers_are_not_loaded_and_a_line_says_so(
    change: dict[str, Any], fresh: set[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = change.pop("names", ("a", "b"))
    _, student, teachers = run(7, *names, **change)
    parts = {"the ladder": student.ladder, "the statistics": teachers}
    before = {
        what: {k: v.clone() for k, v in part.state_dict().items()} for what, part in parts.items()
    }
    warm_start.start(str(folder), student, teachers)
    printed = capsys.readouterr().out
    for what, part in parts.items():
        kept = all(torch.equal(v, before[what][k]) for k, v in part.state_dict().items())
        assert kept == (what in fresh)
        assert bool(re.search(rf"{what} (is|are) not loaded", printed)) == (what in fresh)
    assert same(student.encoder, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("model", "first", "then"),
    [
        ("vit_tiny_patch16_224", 32, 48),
        ("vit_tiny_patch16_224", 64, 32),
        ("vit_small_patch14_reg4_dinov2", 28, 42),  # registers: positions of the patches alone
        ("vit_wee_patch16_reg1_gap_256", 32, 48),  # a register, no CLS
        ("vit_small_patch16_dinov3", 32, 48),  # rotary positions
    ],
)
def test_position_embeddings_are_resized_as_timm_does(
    model: str, first: int, then: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    source = timm.create_model(model, img_size=first, num_classes=0, dynamic_img_size=False).eval()
    stir(source)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    _, student, _ = run(7, model=model, size=then, ladder=config.Ladder(rungs="last"))
    warm_start.start_encoder(str(tmp_path / "vit.safetensors"), student.encoder)
    source.set_input_size(img_size=then)
    image_B3HW = torch.randn(2, 3, then, then)
    with torch.no_grad():
        ours, theirs = (
            each.eval().forward_features(image_B3HW) for each in (student.encoder, source)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    resized = "position embeddings resized" in capsys.readouterr().out
    assert resized == ("dinov3" not in model)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda s: s | {"extra": torch.ones(1)}, "extra is unknown"),
        (lambda s: s | {"a\nb\x1b[2J": torch.ones(1)}, r"a\\nb\\x1b\[2J is unknown"),
        (
            lambda s: {k: v for k, v in s.items() if ".qkv." not in k},
            "blocks.0.attn.qkv.bias is missing and 23 more",
        ),
        (
            lambda s: s | {"patch_embed.proj.weight": torch.ones(192, 3, 14, 14)},
            r"patch_embed.proj.weight is \(192, 3, 14, 14\), not \(192, 3, 16, 16\)",
        ),
        (lambda s: s | {"pos_embed": torch.ones(1, 8, 192)}, "no square grid after 1 prefix"),
        (lambda s: s | {"pos_embed": torch.ones(1, 10, 64)}, r"pos_embed is \(1, 5, 64\), not"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(
    spoil: Any, sentence: str, folder: Path, tmp_path: Path
) -> None:
    save_file(spoil(load_file(folder / "model.safetensors")), tmp_path / "vit.safetensors")
    _, student, teachers = run(7)
    with pytest.raises(ValueError, match=sentence):
        warm_start.start(str(tmp_path / "vit.safetensors"), student, teachers)


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("model", lambda x: x.index_fill(0, torch.tensor([0]), -torch.inf), "is not finite"),
        ("model", lambda x: x.long(), "is int64, not float32"),
        ("model", lambda x: x + 1j, "is complex64, not float32"),
        ("model", lambda x: x.to(torch.float8_e5m2), "is float8_e5m2, not float32"),
        ("ladder", lambda x: torch.full_like(x, torch.nan), "is not finite"),
        ("statistics", lambda x: x > 0, "is bool, not float32"),
    ],
)
def test_unsound_weights_are_refused_and_nothing_is_taken(
    name: str, spoil: Any, says: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "student")
    file = tmp_path / "student" / f"{name}.safetensors"
    state = load_file(file)
    last = sorted(state)[-1]
    save_file(state | {last: spoil(state[last])}, file)
    _, student, teachers = run(7)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name}.safetensors' holds no sound weights: .* {says}"):
        warm_start.start(str(tmp_path / "student"), student, teachers)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_only_safetensors_are_read(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "vit.safetensors")
    _, student, teachers = run(7)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        warm_start.start(str(tmp_path / "vit.safetensors"), student, teachers)


def test_a_missing_start_is_refused_at_the_door(folder: Path, tmp_path: Path) -> None:
    job.check_init(config.Student())
    job.check_init(config.Student(init=str(folder)))
    job.check_init(config.Student(init=str(folder / "model.safetensors")))
    with pytest.raises(ValueError, match=r"no model folder and no \.safetensors file"):
        job.check_init(config.Student(init=str(tmp_path / "none")))
    (tmp_path / "vit.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no model folder and no \.safetensors file"):
        job.check_init(config.Student(init=str(tmp_path / "vit.pth")))
    with pytest.raises(ValueError, match=r"holds no model\.safetensors; give a run's student/"):
        job.check_init(config.Student(init=str(folder.parent)))
