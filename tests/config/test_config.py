"""Options: coerced by annotation, strict, and told from machinery."""

import pytest

from unic_ds.config import Config, Data, Optim, Teacher, overrides
from unic_ds.config.overrides import override_all
from unic_ds.config.teacher_source import TeacherSource


def test_values_follow_the_annotation_not_their_looks():
    cfg = override_all(
        Config(),
        {
            "data.train": "runs#2",
            "data.val": "007",
            "optim.lr": "1e-4",
            "optim.batch_size": "0064",
            "eval.on": "False",
            "student.mean": "0.5,0.5,0.5",
            "ladder.rungs": "2,5",
        },
    )
    assert (cfg.data.train, cfg.data.val) == ("runs#2", "007")
    assert (cfg.optim.lr, cfg.optim.batch_size, cfg.eval.on) == (1e-4, 64, False)
    assert (cfg.student.mean, cfg.ladder.rungs) == ((0.5, 0.5, 0.5), "2,5")


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        ("optim.lrr", "1", r"unknown option --optim.lrr \(did you mean optim.lr\?\)"),
        ("stpes", "1", "unknown option --stpes"),
        ("optim", "1", "--optim is a section"),
        ("seed.x", "1", "--seed has no parts"),
        ("optim.batch_size", "a,b", "--optim.batch_size must be a whole number, got 'a,b'"),
        ("optim.batch_size", "64.5", "must be a whole number, got '64.5'"),
        ("optim.batch_size", "None", "must be a whole number, got 'None'"),
        ("optim.lr", "nan", "--optim.lr must be finite"),
        ("optim.lr", "-1", "optim.lr must be positive"),
        ("eval.on", "maybe", "--eval.on must be true or false, got 'maybe'"),
        ("data.augment", "strong", "one of unic, weak, none"),
        ("data.readers", "0", "data.readers must be >= 1, got 0"),
        ("drop.rate", "1.5", r"drop.rate must be in \[0, 1\], got 1.5"),
        ("ladder.rungs", "a,b", "ladder.rungs must be all, half, middle, last"),
        ("student.mean", "123.675,116.28,103.53", r"student.mean must be in \[0, 1\] .*by 255"),
        ("student.std", "0.2,0,0.2", r"student.std must be in \(0, 1\]"),
        ("student.mean", "0.5,0.5", "student.mean must be three numbers"),
        ("student.size", "1000000", "student.size must be from 1 to 16384, got 1000000"),
        ("student.registers", "100000", "student.registers must be from -1 to 4096"),
        ("ladder.width", "10000000", "ladder.width must be from 0 to 1000000"),
        ("teachers", "resnet50", "must be timm:, open_clip:, file:, run: or python:"),
        ("teachers", "timm:a,timm:a", "must be different"),
        ("teachers", "file:x.safetensors", "#arch="),
        ("teachers.x.size", "1", "unknown teacher 'x'"),
    ],
)
def test_what_cannot_be_is_one_sentence(path, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        override_all(Config(), {path: text})


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("mean", "123.675,116.28,103.53", r"teachers.a.mean must be in \[0, 1\] .*divided by 255"),
        ("mean", "-0.1,0.5,0.5", r"teachers.a.mean must be in \[0, 1\]"),
        ("std", "58.395,57.12,57.375", r"teachers.a.std must be in \(0, 1\] .*divided by 255"),
        ("std", "0,1,1", r"teachers.a.std must be in \(0, 1\]"),
        ("size", "99999", "teachers.a.size must be from 0 to 16384"),
        ("patch", "99999", "teachers.a.patch must be from 0 to 1024"),
        ("micro", "-1", "teachers.a.micro must be from 0 to 1000000"),
    ],
)
def test_a_teacher_s_row_has_bounds(key, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        override_all(Config(), {"teachers": "a=timm:x", f"teachers.a.{key}": text})


def test_teachers_by_name_and_their_overrides():
    cfg = override_all(
        Config(),
        {
            "teachers.clip.size": "336",
            "teachers.clip.mean": "0.5,0.5,0.5",
            "teachers": "timm:vit_base_patch14_dinov2.lvd142m,"
            "clip=open_clip:ViT-H-14-quickgelu/metaclip_fullcc,"
            "file:/a/My-Net.safetensors#arch=vit_base_patch16_224,python:my.module:build",
        },
    )
    assert [t.name for t in cfg.teachers] == ["vit_base_patch14_dinov2", "clip", "my_net", "build"]
    assert cfg.teachers[1].size == 336
    assert cfg.teachers[1].mean == (0.5, 0.5, 0.5)
    assert cfg.teachers[2].source == "file:/a/My-Net.safetensors#arch=vit_base_patch16_224"


def test_yaml_round_trip_keeps_everything():
    cfg = Config(
        seed=5,
        teachers=(
            Teacher(name="a", source="timm:x", std=(0.1, 0.2, 0.3), block="4", channels_last=True),
        ),
        data=Data(train="/x,y", val_share=0.25),
        optim=Optim(lr=1.2345678901234567e-4),
    )
    assert overrides.from_dict(overrides.to_dict(cfg)) == cfg


def test_a_path_may_hold_commas():
    cfg = Config(teachers=(Teacher(name="a", source="file:/x,y=z/w.pth#arch=resnet18"),))
    assert overrides.from_dict(overrides.to_dict(cfg)) == cfg


def test_the_order_of_the_teachers_is_science():
    rows = (Teacher(name="a", source="timm:x"), Teacher(name="b", source="timm:y"))
    assert overrides.science(Config(teachers=rows)) != overrides.science(
        Config(teachers=rows[::-1])
    )


def test_science_leaves_the_machinery_out():
    one, two = (
        Config(),
        override_all(
            Config(),
            {"run.save_every": "7", "data.threads": "3", "data.readers": "3", "data.train": "/x"},
        ),
    )
    assert overrides.science(one) == overrides.science(two)
    assert overrides.science(one) != overrides.science(override_all(one, {"optim.lr": "1"}))


def test_every_option_has_help():
    assert all(text for _, _, text in overrides.options_of())


def test_steps_and_warm_up_come_from_epochs():
    cfg = Optim(batch_size=64, epochs=2, warmup_epochs=0.5)
    assert (cfg.step_count(1000), cfg.warmup_steps(1000)) == (31, 8)
    assert Optim(steps=3, warmup_epochs=10).warmup_steps(10_000) == 3


def test_old_names_of_options_are_still_read():
    """On the command line, in a stage, in a file; the new name stands in what is written."""
    old = {"student.checkpoint": "every:2", "ladder.recompute": "all"}
    cfg = override_all(Config(), old)
    assert cfg.student.activation_checkpointing == "every:2"
    assert cfg.ladder.activation_checkpointing == "all"
    plain = overrides.to_dict(cfg)
    assert overrides.from_dict({"student": {"checkpoint": "every:2"}}).student == cfg.student
    assert "checkpoint" not in plain["student"] and "recompute" not in plain["ladder"]
    twice = {"student.activation_checkpointing": "full", "student.checkpoint": "full"}
    with pytest.raises(ValueError, match=r"--student.checkpoint is given twice, as"):
        override_all(cfg, twice)


def test_options_that_are_right_only_together_are_built_once():
    cfg = override_all(Config(), {"standardise.kind": "phi_s", "standardise.fit_steps": "5"})
    assert (cfg.standardise.kind, cfg.standardise.fit_steps) == ("phi_s", 5)
    with pytest.raises(ValueError, match=r"standardise.fit_steps must be positive"):
        override_all(Config(), {"standardise.kind": "phi_s"})


@pytest.mark.parametrize(
    ("text", "kind", "model", "name"),
    [
        ("timm:vit_base_patch14_dinov2.lvd142m", "timm", "vit_base_patch14_dinov2.lvd142m", ""),
        ("open_clip:ViT-H-14-quickgelu/metaclip_fullcc", "open_clip", "ViT-H-14-quickgelu", ""),
        ("file:/a/My-Net.pth#arch=vit_base_patch16_224", "file", "vit_base_patch16_224", "my_net"),
        ("python:my.module:build", "python", "", "build"),
        ("mine:something/else", "mine", "", "something"),
    ],
)
def test_a_teacher_s_source_is_parsed_into_its_parts(text, kind, model, name):
    source = TeacherSource.parse(text)
    assert (source.text, source.kind, source.model) == (text, kind, model)
    assert source.default_name == name or not name
    assert source.without_folders == text.replace("/a/", "")
