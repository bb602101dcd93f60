"""The student of a run as a teacher: its tokens, what it is known by, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from handed_over import MEAN, STD, images, student, student_folder
from runs import LOST, curve, options, run, together, verb
from safetensors.torch import load_file, save_file

from unic_ds import config
from unic_ds.config import job, overrides
from unic_ds.config.teacher_source import TeacherSource
from unic_ds.models.encoder import build_encoder, features
from unic_ds.models.model_folder import ModelFolder
from unic_ds.planning.trace import teacher_cost
from unic_ds.teachers import licences, sources
from unic_ds.teachers.teacher import Teacher, load
from unic_ds.tokens import Normalise, Tokens
from unic_ds.weights import card_facts, export

CPU = torch.device("cpu")
FACTS = {
    "wide": {"source": "timm:x", "licence": "Apache-2.0"},
    "narrow": {"source": "timm:y", "licence": "cc-by-nc-4.0"},
}


def row_of(path: object, **keys: Any) -> config.Teacher:
    return config.Teacher(**{"name": "big", "source": f"run:{path}", "precision": "fp32"} | keys)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a student of 32 px, with a grid of 2 x 2."""
    out = tmp_path_factory.mktemp("runs") / "Big run.v2"
    student_folder(out / "student", teachers=FACTS)
    (out / "config.yaml").write_text(yaml.safe_dump(overrides.to_dict(config.Config())))
    return out


def near(teacher: Teacher, truth: Tokens) -> None:
    found = teacher(images(teacher.size))
    for x, y in zip(found, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_its_tokens_are_the_exported_student_s(finished_run: Path) -> None:
    handed = student()
    truth = export.tokens(handed.encoder, handed.cfg, images(32))
    for path in (finished_run, finished_run / "student"):
        teacher = load(row_of(path), grid=2, device=CPU)
        near(teacher, truth)
        facts = teacher.facts()
        assert (facts["size"], facts["patch"], facts["width"], facts["cls"]) == (
            32,
            16,
            64,
            "token",
        )
        assert (tuple(facts["mean"]), tuple(facts["std"])) == (MEAN, STD)
        assert len(facts["content"]) == 64


@pytest.mark.parametrize("grid", [2, 3])
def test_a_file_of_the_same_weights_is_the_same_teacher(finished_run: Path, grid: int) -> None:
    """On another grid timm resamples the position embeddings of both."""
    file = finished_run / "student" / "model.safetensors"
    same = row_of("", source=f"file:{file}#arch=test_vit", mean=MEAN, std=STD)
    theirs, ours = (load(row, grid=grid, device=CPU) for row in (same, row_of(finished_run)))
    assert ours.size == theirs.size == 16 * grid
    near(ours, theirs(images(ours.size)))
    assert ours.facts()["content"] == theirs.facts()["content"]
    inner = load(row_of(finished_run, block="2"), grid=grid, device=CPU)
    near(inner, load(replace(same, block="2"), grid=grid, device=CPU)(images(inner.size)))


def exported(out: Path, cfg: config.Student) -> Callable[[], Tokens]:
    """A model folder of a student of random weights; a function of its tokens."""
    torch.manual_seed(0)
    encoder = build_encoder(cfg).eval().requires_grad_(False)
    whole = config.Config(student=cfg)
    export.export(encoder.state_dict(), whole, images(cfg.size), out)
    x_B3HW = Normalise(cfg.mean, cfg.std)(images(cfg.size), torch.float32)
    return lambda: features(encoder, x_B3HW)


@pytest.mark.parametrize(
    "shape",
    [
        {"model": "vit_tiny_patch16_224", "registers": 3},
        {"model": "test_vit", "heads": 1, "mlp_width": 40},
        {"model": "vit_base_patch16_siglip_224"},
    ],
    ids=["registers", "pruned", "pool"],
)
def test_students_of_other_shapes_are_teachers(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Registers are no patches; an attention pool that no run has trained is not its summary."""
    cfg = config.Student(size=32, drop_path=0.0, **shape)
    with torch.random.fork_rng():
        tokens = exported(tmp_path / "student", cfg)
    code = tmp_path / "student" / "narrow_vit.py"
    assert code.is_file() == ("heads" in shape)
    code.write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")  # a folder's code is not run
    teacher = load(row_of(tmp_path), grid=2, device=CPU)
    near(teacher, tokens())
    assert not (tmp_path / "owned").exists()
    assert teacher.summary == ("mean of patches" if "siglip" in shape["model"] else "token")


def test_the_planner_and_the_checks_know_it(finished_run: Path) -> None:
    row = row_of(finished_run)
    cost = teacher_cost(row, 3, 2)
    parameters = sum(p.numel() for p in build_encoder(student().cfg).parameters())
    assert (cost.size, cost.width, sources.own_size(row)) == (48, 64, 32)
    assert cost.parameters == parameters + 5 * 64  # positions of the larger grid
    sources.check_weights(row, 3)
    assert sources.facts(row)["path"] == str(finished_run / "student" / "model.safetensors")


def test_the_licences_of_its_teachers_are_its_licence(finished_run: Path, tmp_path: Path) -> None:
    model = sources.outline(row_of(finished_run), grid=2)
    assert model.licence == "Apache-2.0 AND cc-by-nc-4.0"
    assert licences.licence_class(model.licence) == "non-commercial"
    assert licences.licence_class("MIT AND Apache-2.0") == "permissive"
    assert licences.licence_class("MIT AND unknown") == "unknown"
    manifest = {"big": {"source": f"run:{finished_run}/student", "licence": model.licence}}
    (found,) = card_facts.teacher_rows(config.Config(teachers=()), manifest)
    assert (found.source, found.terms) == ("run:Big run.v2", "non-commercial")
    assert card_facts.licence_keys([found]) == {"license": "cc-by-nc-4.0"}
    shutil.copytree(finished_run / "student", tmp_path / "bare")
    (tmp_path / "bare" / "ladder.json").unlink()
    assert sources.outline(row_of(tmp_path / "bare"), grid=2).licence == ""


def test_its_name_is_the_run_s() -> None:
    names = {"runs/Big.v2": "big_v2", "runs/big/student": "big", "student": "student", "/": "t_"}
    for path, name in names.items():
        assert TeacherSource.parse(f"run:{path}").default_name == name
    shown = overrides.science(config.Config(teachers=(row_of("/secret/big"),)))
    assert shown["teachers.big.source"] == "run:"  # its weights' content identifies it


def spoil(folder: Path, name: str) -> None:
    """Damage a copy of a run in one way."""
    file = folder / "student" / "model.safetensors"
    weights = {key: value.clone() for key, value in load_file(file).items()}  # it is mapped
    if name == "unfinished":
        file.unlink()
    elif name == "nothing":
        shutil.rmtree(folder)
    elif name == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif name == "lacks":
        del weights["blocks.5.mlp.fc2.weight"]
        save_file(weights, file)
    elif name == "not finite":
        save_file(weights | {"norm.bias": torch.full((64,), float("nan"))}, file)
    elif name == "pickle":
        torch.save(weights, file)
    elif name == "other config":
        (folder / "student" / "config.json").write_text('{"architecture": "resnet18"}')
    elif name == "bad ladder":
        (folder / "student" / "ladder.json").write_text("[]")


@pytest.mark.parametrize(
    ("name", "keys", "sentence"),
    [
        ("unfinished", {}, "the run '.*copy' is not finished, it has no student/; start its c"),
        ("nothing", {}, "copy' holds neither a run nor a student .* run:PATH of a finished run"),
        ("empty", {}, "copy' holds neither a run nor a student"),
        ("lacks", {}, "model.safetensors does not fit config.json: .*blocks.5.mlp.fc2.weight"),
        ("not finite", {}, "norm.bias .*not finite"),
        ("pickle", {}, "'big': .*model.safetensors"),
        ("other config", {}, "config.json describes no student"),
        ("bad ladder", {}, "describes no ladder"),
        ("", {"size": 40}, r"teachers\.big\.size must be a multiple of its patch 16, got 40"),
        ("", {"patch": 8}, r"teachers\.big\.patch must be 0 or its own 16, got 8"),
        ("", {"block": "6"}, r"teachers\.big\.block must be output, middle or below 6, got 6"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    finished_run: Path, tmp_path: Path, name: str, keys: dict[str, Any], sentence: str
) -> None:
    copy = Path(shutil.copytree(finished_run, tmp_path / "copy"))
    spoil(copy, name)
    with pytest.raises(ValueError, match=sentence) as error:
        load(row_of(copy, **keys), grid=2, device=CPU)
    assert "\n" not in str(error.value) and "big" in str(error.value)


DS = {"ds_config": "ds_configs/zero2.json", "data.train": "."}


def resolve(out: Path, source: object, **more: str) -> job.Job:
    return job.resolve({**DS, "out": str(out), "teachers": f"big=run:{source}"} | more, ranks=1)


def test_a_run_is_refused_before_ranks_connect(finished_run: Path, tmp_path: Path) -> None:
    """Of itself, through links too; of a run that is not finished. No folder is made."""
    copy = Path(shutil.copytree(finished_run, tmp_path / "copy"))
    (tmp_path / "link").symlink_to(copy)
    for out, source in (
        (copy, copy),
        (copy, tmp_path / "link" / "student"),
        (tmp_path / "link", copy),
        (copy, f"{tmp_path}/x/../copy"),
    ):
        with pytest.raises(ValueError, match=r"'big': 'run:.*' is this run itself, whose --out is"):
            resolve(out, source)
    inside = resolve(copy / "small", copy)  # its own student is elsewhere
    assert inside.out == copy / "small"
    spoil(copy, "unfinished")
    with pytest.raises(ValueError, match=r"is not finished.*unic-ds export .*copy`"):
        resolve(tmp_path / "new", copy)
    assert not (tmp_path / "new").exists() and not (copy / "small").exists()


def test_the_table_of_a_finished_run_is_not_that_of_another_teacher(
    finished_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    shutil.copytree(finished_run / "student", out / "student")
    (out / "results.json").write_text("{}")
    cfg = resolve(tmp_path / "new", finished_run).cfg
    (out / "config.yaml").write_text(yaml.safe_dump(overrides.to_dict(cfg)))
    assert resolve(out, finished_run).finished
    assert resolve(out, finished_run / "student").finished  # the same by another path
    other = Path(shutil.copytree(finished_run, tmp_path / "other"))
    with pytest.raises(
        ValueError, match=r"teachers\.big\.source was 'run:.*v2', now 'run:.*other'"
    ):
        resolve(out, other)


@pytest.mark.dist
def test_a_small_student_learns_from_a_run_and_from_one_of_its_teachers(finished, tmp_path) -> None:
    """Two ranks, resumed after the first run has moved: the curve is that of a file: teacher."""
    big, small = tmp_path / "big", tmp_path / "small"
    shutil.copytree(finished[0], big)
    (tmp_path / "moved").symlink_to(big)
    effnet = next(
        row["source"]
        for name, row in yaml.safe_load((big / "config.yaml").read_text())["teachers"].items()
        if name == "effnet"
    )
    made = ModelFolder(big / "student").student
    file = f"file:{big}/student/model.safetensors#arch={made.model}"
    shown = {"teachers__effnet__size": 64, "teachers__effnet__channels_last": True}
    fp32 = {"teachers__big__precision": "fp32", "teachers__effnet__precision": "fp32"}
    more = LOST | shown | fp32 | {"optim__steps": 4, "run__save_every": 2, "eval__on": "false"}

    def words(out: Path, source: str, **given: object) -> list[str]:
        return options(out, teachers=f"big={source},effnet={effnet}", **more | given)

    known = {f"teachers__big__{k}": ",".join(map(str, getattr(made, k))) for k in ("mean", "std")}
    plan = [
        words(small, f"run:{big}", run__stop_at=2),
        words(small, f"run:{tmp_path}/moved/student"),
        words(tmp_path / "by_file", file, **known),
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    printed = run(together(tmp_path / "plan.json"))
    assert "resumed after step 2" in printed
    assert curve(small) == curve(tmp_path / "by_file") and list(curve(small)) == [1, 2, 3, 4]
    facts = json.loads((small / "teachers.json").read_text())
    assert (
        facts["big"]["content"]
        == json.loads((tmp_path / "by_file" / "teachers.json").read_text())["big"]["content"]
    )
    assert facts["big"]["licence"] == "Apache-2.0 AND MIT"
    card = (small / "student" / "README.md").read_text()
    assert "| big | `run:moved` | Apache-2.0 AND MIT | permissive |" in card
    assert "license_name: apache-2.0-and-mit\n" in card and str(tmp_path) not in card
    checked = json.loads(
        run(verb("teachers", "check", "--teachers", f"run:{small}", "--json")).splitlines()[-1]
    )
    assert checked["small"]["width"] == 192 and checked["small"]["size"] == 112
