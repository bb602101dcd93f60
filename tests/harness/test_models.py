"""Models from their names: the tokens of the run, its ladder's predictions, or one sentence."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
import yaml
from plain import write_published
from safetensors.torch import load_file, save_file
from torch import Tensor

from unic_ds import config
from unic_ds.config import overrides
from unic_ds.evaluate.features import Model
from unic_ds.harness import models
from unic_ds.harness.students import student_model
from unic_ds.models.encoder import grid_of
from unic_ds.models.ladder import heads_of
from unic_ds.models.ladder_description import FILE, of_run
from unic_ds.models.model_folder import LADDER, STATISTICS, WEIGHTS
from unic_ds.models.student import Student
from unic_ds.teachers import sources
from unic_ds.teachers.teacher import load
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import Tokens
from unic_ds.weights import import_unic
from unic_ds.weights.export import export

CPU = torch.device("cpu")
ALL = frozenset({"cls", "patch", "projection"})
TEACHERS = tuple(
    config.Teacher(name=name, source=f"python:small_teacher:{name}") for name in ("narrow", "wide")
)
CFG = config.Config(
    teachers=TEACHERS,
    student=config.Student(model="test_vit", size=32, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25)),
    ladder=config.Ladder(rungs="2,5", width=24),
    standardise=config.Standardise(target_clamp=3.0),
)
FITTED = {"kind": "phi_s", "fit_steps": 1}
CHANGES: dict[str, dict[str, Any]] = {
    "sum": {},
    "each": {"ladder": config.Ladder(rungs="2,5", width=24, combine="each")},
    "norms": {"ladder": config.Ladder(rungs="last", width=24, prenorm=True, midnorm=True)},
    "transformer": {"ladder": config.Ladder(rungs="last", projector="transformer")},
    "own rungs": {"teachers": (TEACHERS[0], replace(TEACHERS[1], rungs="3,5"))},
    "cls alone": {"loss": config.Loss(patch="none")},
    "not standardised": {"standardise": config.Standardise(on=False)},
    "phi_s": {"standardise": config.Standardise(kind="phi_s", fit_steps=1)},
}
"""Settings of a run that decide a ladder's predictions."""


class Run:
    """A folder with the files of a run, and the student and statistics that are in it."""

    def __init__(self, out: Path, cfg: config.Config):
        self.out, self.cfg = out, cfg
        self.teachers = TeacherSet(
            cfg.teachers, grid=grid_of(cfg.student), standardise=cfg.standardise, device=CPU
        )
        heads = heads_of(cfg, self.teachers.widths)
        self.student = Student(cfg.student, cfg.ladder, heads, seed=1).eval()
        draw = torch.Generator().manual_seed(0)
        for value in (*self.student.parameters(), *self.teachers.state_dict().values()):
            value.data.add_(torch.rand(value.shape, generator=draw), alpha=0.05)
        facts = self.teachers.manifest()
        export(
            self.student.encoder.state_dict(),
            cfg,
            images(32),
            out / "student",
            extras={
                LADDER: self.student.ladder.export_state_dict(),
                STATISTICS: self.teachers.state_dict(),
            },
            description=of_run(cfg, facts),
        )
        (out / "config.yaml").write_text(yaml.safe_dump(overrides.to_dict(cfg)))
        (out / "teachers.json").write_text(json.dumps(facts))


def images(side: int, count: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=draw)


def no_export(run: Path) -> Path:
    raise ValueError(f"--run {str(run)!r} holds no checkpoint yet")


def build(*specs: object, cfg: config.Config = CFG, **more: Any) -> list[Model]:
    return models.build([str(s) for s in specs], cfg, CPU, export=more.get("export", no_export))


def near(found: Sequence[Tensor], truth: Sequence[Tensor], bound: float = 1e-5) -> None:
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the settings `CFG`."""
    return Run(tmp_path_factory.mktemp("models") / "full", CFG)


def copied(run: Run, tmp_path: Path) -> Path:
    """A copy of a run's folder."""
    return Path(shutil.copytree(run.out, tmp_path / run.out.name))


def predicted(run: Run) -> dict[str, Tokens]:
    """Features that a run's live student predicts."""
    model = student_model("live", run.student, run.cfg.student, statistics=run.teachers.norms)
    found = model.encode(images(32), frozenset({"projection"})).projection
    assert found is not None
    return dict(found)


def test_a_run_and_its_folder_give_the_features_of_its_encoder(run: Run) -> None:
    truth = run.student.encode(images(32))
    for model, name in zip(build(run.out, f"x={run.out}/student"), ("full", "x"), strict=True):
        assert (model.name, model.role, model.size, model.patch) == (name, "student", 32, 16)
        found = model.encode(images(32), ALL)
        assert found.cls_BC is not None and found.patch_BNC is not None
        assert found.cls_BC.dtype == torch.float32 and not found.cls_BC.requires_grad
        near((found.cls_BC, found.patch_BNC), truth)


def test_a_projection_is_the_ladder_s_output_with_the_standardisation_undone(run: Run) -> None:
    (model,) = build(run.out)
    found = model.encode(images(32), frozenset({"projection"}))
    assert found.cls_BC is None and found.projection is not None
    with torch.no_grad():
        preds = run.student(images(32))
    for name, pred in preds.items():
        state = run.teachers.norms[name].state_dict()
        for kind in (0, 1):
            std_C = state["std_2C"][kind]
            divisor_C = std_C.clamp(min=0.1 * float(std_C.median())) + 1e-6
            want = pred[kind] * divisor_C + state["mean_2C"][kind]
            near([found.projection[name][kind]], [want])


@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_ladder_is_read_back(change: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", replace(CFG, **CHANGES[change]))
    truth = predicted(run)
    (model,) = build(run.out)
    found = model.encode(images(32), ALL).projection
    assert found is not None and list(found) == ["narrow", "wide"]
    for name, width in (("narrow", 24), ("wide", 40)):
        near(found[name], truth[name])
        assert found[name].cls_BC.shape == (3, width)
        assert len(found[name].patch_BNC) == (0 if change == "cls alone" else 3)


def test_the_last_rung_predicts_if_each_has_a_loss(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", replace(CFG, **CHANGES["each"]))
    with torch.no_grad():
        pred_LBC = run.student(images(32))["wide"].cls_BC
    norm = run.teachers.norms["wide"]
    assert len(pred_LBC) == 2
    near([predicted(run)["wide"].cls_BC], [pred_LBC[-1] * norm.divisor()[0] + norm.mean_2C[0]])


def test_a_ladder_that_reproduces_its_teacher_has_its_features(tmp_path: Path) -> None:
    """The teacher is the student's own encoder, the ladder its final norm and the statistics."""
    file = tmp_path / "vit.safetensors"
    student = replace(CFG.student, mean=(0.5,) * 3, std=(0.5,) * 3)
    save_file(Student(student, CFG.ladder, {}, seed=1).encoder.state_dict(), file)
    row = config.Teacher(name="same", source=f"file:{file}#arch=test_vit", size=32)
    ladder = config.Ladder(rungs="last", projector="linear", prenorm=True)
    run = Run(tmp_path / "run", replace(CFG, student=student, teachers=(row,), ladder=ladder))
    norm = run.teachers.norms["same"]
    for kind, name in enumerate(("cls", "patch")):
        run.student.ladder.get_submodule(f"heads.same.{name}.5.layers.0").eps = 1e-6  # as timm's
        for key, value in (
            ("0.weight", torch.ones(64)),
            ("0.bias", torch.zeros(64)),
            ("1.weight", torch.diag(1 / norm.divisor()[kind])),
            ("1.bias", -norm.mean_2C[kind] / norm.divisor()[kind]),
        ):
            run.student.ladder.get_parameter(f"heads.same.{name}.5.layers.{key}").data.copy_(value)
    run.student.encoder.load_state_dict(load_file(file))
    live = student_model("live", run.student, student, statistics=run.teachers.norms)
    (teacher,) = build("same", cfg=run.cfg)
    found, truth = (m.encode(images(32), ALL).projection for m in (live, teacher))
    assert found is not None and truth is not None
    near(found["same"], truth["same"])


def test_another_side_has_positions_that_timm_resamples(run: Run) -> None:
    (model,) = build(run.out)
    theirs = copy.deepcopy(run.student)
    theirs.encoder.set_input_size(img_size=48)
    assert model.at is not None and model.frees is None
    other = model.at(48)
    assert (other.name, other.size, other.identity == model.identity) == ("full", 48, False)
    found = other.encode(images(48), ALL)
    assert found.cls_BC is not None and found.patch_BNC is not None and found.projection
    near((found.cls_BC, found.patch_BNC), theirs.encode(images(48)))
    assert found.projection["wide"].patch_BNC.shape == (3, 9, 40)
    (given,) = build(run.out, cfg=replace(CFG, eval=config.Eval(size=48)))
    near([given.encode(images(48), ALL).cls_BC], [found.cls_BC])
    assert given.identity == other.identity and given.at is not None
    assert given.at(32).identity == model.identity
    near([given.at(32).encode(images(32), ALL).cls_BC], [model.encode(images(32), ALL).cls_BC])
    assert other.frees is not None
    other.frees()
    with pytest.raises(IndexError):
        other.encode(images(48), ALL)
    near([model.encode(images(32), ALL).cls_BC], [run.student.encode(images(32)).cls_BC])


def test_a_live_student_is_read_as_it_is(run: Run) -> None:
    student = copy.deepcopy(run.student)
    model = student_model("live", student, CFG.student)
    assert "projection" not in model.outputs and model.identity == ""
    with torch.no_grad():
        student.encoder.cls_token.add_(1)
    near([model.encode(images(32), ALL - {"projection"}).cls_BC], [student.encode(images(32))[0]])


def test_a_row_has_the_tokens_of_the_run_s_targets(run: Run) -> None:
    cfg = replace(CFG, student=replace(CFG.student, size=48))
    (model,) = build("wide", cfg=cfg)
    teacher = load(replace(TEACHERS[1], precision="fp32"), grid=3, device=CPU)
    assert (model.name, model.role, model.size, model.patch) == ("wide", "teacher", 32, 16)
    found, truth = model.encode(images(32), ALL), teacher(images(32))
    assert found.patch_BNC is not None and found.projection is not None
    near(found.projection["wide"], truth, 0)
    near([found.patch_BNC], [teacher.on_own_grid(images(32)).patch_BNC], 0)
    assert found.patch_BNC.shape == (3, 4, 40)
    assert found.projection["wide"].patch_BNC.shape == (3, 9, 40)


def test_a_source_has_the_side_of_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    save_file(Student(CFG.student, CFG.ladder, {}, seed=1).encoder.state_dict(), file)
    source = f"file:{file}#arch=test_vit"
    own, given = (
        build(source, f"small={source}"),
        build(f"b={source}", cfg=replace(CFG, eval=config.Eval(size=32))),
    )
    assert [(m.name, m.size, m.role) for m in own + given] == [
        ("vit.safetensors", 160, "teacher"),
        ("small", 160, "teacher"),
        ("b", 32, "teacher"),
    ]
    for model, key, grid in ((own[0], "vit", 10), (own[1], "small", 10), (given[0], "b", 2)):
        found = model.encode(images(model.size, 1), ALL).projection
        assert found is not None and found[key].patch_BNC.shape == (1, grid**2, 64)
    assert own[0].at is not None
    near(
        own[0].at(32).encode(images(32), ALL)[:2],  # type: ignore[arg-type]
        given[0].encode(images(32), ALL)[:2],  # type: ignore[arg-type]
    )
    assert own[0].identity == own[1].identity != given[0].identity != ""


@pytest.mark.parametrize(
    ("source", "side"),
    [
        ("timm:vit_small_patch14_dinov2", 518),
        ("timm:vit_base_patch16_siglip_384.webli", 384),
        ("file:x.pth#arch=test_vit", 160),
        ("open_clip:ViT-L-14-336/openai", 336),
        ("python:small_teacher:wide", 0),
    ],
)
def test_sources_know_the_side_of_their_weights(source: str, side: int) -> None:
    assert sources.own_size(config.Teacher(name="x", source=source)) == side


def test_pixels_are_the_baseline() -> None:
    plain, given = build("pixels"), build("x=pixels", cfg=replace(CFG, eval=config.Eval(size=64)))
    assert [(m.name, m.size, m.role) for m in plain + given] == [
        ("pixels", 32, "baseline"),
        ("x", 64, "baseline"),
    ]


def test_an_unfinished_run_is_exported(run: Run, tmp_path: Path) -> None:
    out = copied(run, tmp_path)
    (out / "student").rename(out / "elsewhere")
    asked = []

    def export(folder: Path) -> Path:
        asked.append(folder)
        return folder / "elsewhere"

    (model,) = build(out, export=export)
    assert (model.name, asked) == ("full", [out])
    near([model.encode(images(32), ALL).cls_BC], [run.student.encode(images(32)).cls_BC])


def test_nothing_is_drawn_from_the_global_random_state(run: Run) -> None:
    before = torch.get_rng_state()
    (model,) = build(run.out)
    assert model.at is not None
    model.at(48)
    assert torch.equal(before, torch.get_rng_state())


def test_a_folder_has_the_identity_of_its_weights(run: Run, tmp_path: Path) -> None:
    out = copied(run, tmp_path)
    (first,), (second,) = build(run.out), build(out / "student")
    assert first.identity == second.identity
    state = load_file(out / "student" / WEIGHTS)
    save_file(state | {"cls_token": state["cls_token"] + 1}, out / "student" / WEIGHTS)
    assert build(out)[0].identity != first.identity
    assert build("narrow")[0].identity == ""  # code of a user may change


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("ladder", "combine", "each"), ("standardise", "on", False)],
)
def test_a_folder_has_the_identity_of_its_ladders_settings(
    run: Run, tmp_path: Path, section: str, key: str, value: object
) -> None:
    """Weights and statistics are the same, the projections are not."""
    out = copied(run, tmp_path)
    file = out / "student" / FILE
    plain = json.loads(file.read_text())
    plain[section][key] = value
    file.write_text(json.dumps(plain))
    (before,), (after,) = build(run.out), build(out)
    one, other = (
        m.encode(images(32), frozenset({"projection"})).projection for m in (before, after)
    )
    assert one is not None and other is not None
    assert not torch.equal(one["wide"].cls_BC, other["wide"].cls_BC)
    assert before.identity != after.identity


@pytest.mark.parametrize("left", ["the run's files", "its weights", "an encoder"])
def test_older_folders_have_no_description(
    left: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(run, tmp_path)
    (out / "student" / FILE).unlink()
    if left != "the run's files":
        (out / "teachers.json").unlink()
    if left == "an encoder":
        (out / "student" / LADDER).unlink()
    (model,) = build(out / "student")
    found = model.encode(images(32), model.outputs)
    near([found.cls_BC], [run.student.encode(images(32)).cls_BC])  # type: ignore[list-item]
    said = "full has no predictions of its teachers' features: the folder has no"
    assert (said in capsys.readouterr().out) == (found.projection is None) == (left == "an encoder")
    if found.projection:
        near(found.projection["wide"], predicted(run)["wide"])


def test_a_ladder_that_cannot_be_derived_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path / "run", replace(CFG, **CHANGES["transformer"]))
    (run.out / "student" / FILE).unlink()
    (run.out / "config.yaml").unlink()
    (model,) = build(run.out / "student")
    assert model.outputs == {"cls", "patch"} and model.name == "student"
    assert f"no {FILE} describes its ladder, and " in capsys.readouterr().out


def test_an_imported_checkpoint_predicts_as_its_program_does(tmp_path: Path) -> None:
    write_published(tmp_path, seed=3, widths={"dino": 20, "deit3": 12}, hidden=(8, 16), grid=2)
    file = tmp_path / "published_format.pth"
    (model,) = build(import_unic.import_unic(file, tmp_path / "unic_b"))
    take = parity.load(tmp_path / "published_format_io.npz")
    student = config.Student()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (student.mean, student.std))
    image_B3HW = (torch.from_numpy(take["image"]) * std + mean) * 255
    found = model.encode(image_B3HW, ALL).projection
    assert model.name == "unic_b" and found is not None
    for name, kinds in torch.load(file, weights_only=False)["teacher_ft_stats"].items():
        for ours, kind in zip(found[name], ("cls", "patch"), strict=True):
            mean_C, std_C = (kinds[kind][key].flatten() for key in ("mean", "std"))
            want = torch.from_numpy(take[f"y_{name}_{kind}"]) * (std_C + 1e-6) + mean_C
            assert parity.error(ours, want) < 1e-4


def spoilt(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    """A change of a description: the value of a dotted key."""

    def change(plain: dict[str, Any]) -> object:
        *path, last = key.split(".")
        inner = plain
        for part in path:
            inner = inner[part]
        inner[last] = value
        return plain

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: [1], "it must be an object of JSON"),
        (spoilt("ladder.width", "wide"), "ladder.width must be a whole number, got 'wide'"),
        (spoilt("ladder.wid", 1), "unknown option --ladder.wid"),
        (spoilt("standardise.kind", "x"), "standardise.kind must be one of channel, phi_s"),
        (spoilt("teachers", {}), "teachers must be 1 to 100, got 0"),
        (spoilt("teachers.narrow", 3), "narrow must be an object of JSON"),
        (spoilt("teachers.narrow.width", True), "narrow.width must be from 1 to 1000000, got True"),
        (spoilt("teachers.narrow.width", 10**9), "narrow.width must be from 1 to 1000000"),
        (spoilt("teachers.narrow.kinds", ["patch", "x"]), "narrow.kinds must be some of"),
        (spoilt("teachers.narrow.rungs", "1,x"), "narrow.rungs must be"),
        (spoilt("teachers.Na/me", {"width": 3}), "a teacher's name must be"),
        (spoilt("teachers.forward", {"width": 3}), "a teacher may not be named 'forward'"),
        (spoilt("teachers.narrow.width", 25), "ladder.safetensors is not the ladder described"),
        (spoilt("ladder.width", 900_000), "ladder.safetensors is not the ladder described"),
        (spoilt("ladder.rungs", "2,99"), "99"),
        (spoilt("standardise", FITTED), "statistics.safetensors does not fit the ladder"),
    ],
)
def test_a_wrong_description_is_refused_in_one_sentence(
    change: Callable[[dict[str, Any]], object], says: str, run: Run, tmp_path: Path
) -> None:
    file = copied(run, tmp_path) / "student" / FILE
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError) as error:
        build(file.parent)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "describes no student"),
        ("{}", "student.model has no value"),
        ('{"architecture": "hf-hub:x/y", "pretrained_cfg": 3}', "student.size has no value"),
        (
            '{"architecture": "vit_x", "pretrained_cfg": {"input_size": [3, 32, 32],'
            ' "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}',
            "student.model 'vit_x' is not a timm model",
        ),
        (
            '{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 32, 32],'
            ' "mean": [0.5, 0.5], "std": [0.5, 0.5, 0.5]}}',
            "student.mean must be three numbers",
        ),
        (
            '{"architecture": "test_vit", "pretrained_cfg": {"input_size": [3, 16000, 16000],'
            ' "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}',
            "model.safetensors does not fit config.json: pos_embed is (1, 5, 64), not (1, 1000001",
        ),
    ],
)
def test_a_wrong_encoder_is_refused_in_one_sentence(
    text: str, says: str, run: Run, tmp_path: Path
) -> None:
    folder = copied(run, tmp_path) / "student"
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        build(folder)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (
            ["narow"],
            "model 'narow': it is no folder and none of pixels, narrow, wide (did you mean",
        ),
        (["EMPTY"], "it is neither a model folder (config.json and model.safetensors) nor a run"),
        (["timm:vit_tiny_patch16_225"], "timm has no arch 'vit_tiny_patch16_225' (did you mean"),
        (["timm:test_vi"], "did you mean test_vit"),
        (["nothing:x"], "must begin with one of timm:, open_clip:, file:, run:, python:"),
        (["narrow", "narrow"], "two models are named 'narrow'; name one, as in NAME=narrow"),
        (["RUN", "full=pixels"], "two models are named 'full'; name one"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    specs: list[str], says: str, run: Run, tmp_path: Path
) -> None:
    places = {"EMPTY": str(tmp_path), "RUN": str(run.out)}
    with pytest.raises(ValueError) as error:
        build(*(places.get(spec, spec) for spec in specs))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_side_of_broken_patches_is_refused(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    save_file(run.student.encoder.state_dict(), file)
    cfg = replace(CFG, eval=config.Eval(size=40))
    with pytest.raises(ValueError, match="takes images whose side is a multiple of 16 px, not 40"):
        build(run.out, cfg=cfg)
    with pytest.raises(ValueError, match=r"--eval\.size 40: .* multiple of its patch 16, got 40"):
        build(f"file:{file}#arch=test_vit", cfg=cfg)


def test_a_run_without_a_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    out = copied(run, tmp_path)
    shutil.rmtree(out / "student")
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        build(out)
