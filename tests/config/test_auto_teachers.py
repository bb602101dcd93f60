"""`--teachers auto` before a comparison: refusals, a choice that is kept, ranks that wait."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pictures import folder

from unic_ds import cli
from unic_ds.config import auto_teachers, job, recipes, teacher_choice
from unic_ds.config.overrides import to_dict
from unic_ds.config.teacher_choice import Choice, Step, Wanted
from unic_ds.files import run_files
from unic_ds.process import entry_point

AMONG = "narrow=python:small_teacher:narrow,wide=python:small_teacher:wide"
FILE = """
teachers:
  narrow: {source: "python:small_teacher:narrow", size: 48}
  wide: {source: "python:small_teacher:wide", weight: 2}
  third: {source: "python:small_teacher:following"}
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("images") / "train", 8)


def given(images: Path, out: Path, **more: str | None) -> dict[str, str]:
    """Options of a training command; a value of None leaves one out."""
    options: dict[str, str | None] = {"ds_config": "ds_configs/zero2.json", "recipe": "unic_b"}
    options |= {"teachers": "auto", "among": AMONG, "budget": "2", "out": str(out)}
    options |= {"data.train": str(images), "student.model": "test_vit"}
    options |= {name.replace("__", "."): text for name, text in more.items()}
    return {name: text for name, text in options.items() if text is not None}


def wanted_by(options: dict[str, str]) -> Wanted:
    words = auto_teachers.candidates(options)
    cfg = auto_teachers.configured(options | {"teachers": ",".join(words.values())}, tuple(words))
    settings = teacher_choice.settings_of(cfg)
    return Wanted(budget=auto_teachers.budget_of(options), words=words, settings=settings)


def keep(options: dict[str, str], out: Path, *chosen: str) -> Choice:
    """Keep a choice of so many teachers in a folder."""
    wanted = wanted_by(options)
    steps = [Step(teacher=x, coverage=0.5 + i / 8, cost=1 + i) for i, x in enumerate(chosen)]
    left_out = {name: "costs 9 GFLOPs" for name in wanted.words if name not in chosen}
    choice = Choice(
        budget=wanted.budget, settings=wanted.settings, steps=tuple(steps), left_out=left_out
    )
    out.mkdir(parents=True, exist_ok=True)
    teacher_choice.write(choice, out)
    return choice


MISTAKES: dict[str, tuple[dict[str, str | None], str]] = {
    "no auto": ({"teachers": AMONG, "among": None}, "--budget goes with --teachers auto"),
    "no budget": ({"budget": None}, "--teachers auto needs --budget"),
    "a word": ({"budget": "much"}, "--budget must be a number, got 'much'"),
    "nothing": ({"budget": "0"}, "--budget must be positive, got '0'"),
    "one": ({"among": "a=timm:x"}, "chooses among two teachers or more, got 1"),
    "twice": ({"among": "a=timm:x,a=timm:y"}, "--among's names must be different"),
    "none": ({"among": "dino,dinno"}, "--among must be of the recipe's teachers (dino, deit3,"),
    "a source": ({"among": "dino,x=nowhere"}, "teachers.x.source must be timm:, open_clip:"),
    "no images": ({"data__train": None}, "recipe unic_b has no images; give --data.train"),
    "no folder": ({"data__train": "/nowhere"}, "'/nowhere' does not exist"),
    "no weights": ({"among": "dino,ibot"}, "teacher 'ibot' has no weights at"),
    "unknown": ({"teachers__third__size": "3"}, "unknown teacher 'third'"),
    "a method": ({"recipe": "unic_b+fitnet"}, "'unic_b+fitnet' makes teachers of its own"),
    "a cache": ({"teachers__cache": "x"}, "--teachers.cache 'x' has features of known teachers"),
    "a part": ({"teachers__wide__data": "x"}, "--teachers.wide.data must be empty with"),
    "a stage": ({"stages": "teachers.wide.size=32"}, "sets teachers.wide.size, but --teachers"),
    "resume": ({"resume": "x"}, "--resume must be auto or never with --teachers auto, got 'x'"),
    "extend": ({"run__extend": "true"}, "holds no run to train further"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_before_anything_is_compared(
    images: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, sentence = MISTAKES[case]
    options = given(images, tmp_path / "never", **more)
    argv = [word for pair in options.items() for word in (f"--{pair[0]}", pair[1])]
    assert entry_point.run(cli.dispatch, ["check", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("unic_ds: error: ") and printed.err.count("\n") == 1
    assert sentence in printed.err and printed.out == ""
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("verb", [["cache", "x"], ["teachers", "compare"], ["doctor"]])
def test_other_verbs_take_no_auto(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point.run(cli.dispatch, [*verb, "--teachers", "auto"]) == 2
    assert "--teachers auto is understood by train, check and plan" in capsys.readouterr().err


def test_a_kept_choice_gives_the_chosen_teachers_with_their_settings(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe's settings stay, the order is that of the candidates."""
    file, out = tmp_path / "three.yaml", tmp_path / "run"
    file.write_text(FILE)
    more = {"teachers__wide__precision": "fp32", "teachers__third__size": "64", "recipe": str(file)}
    options = given(images, out, among=None, **more)
    keep(options, out, "wide", "narrow")
    task = job.resolve(auto_teachers.resolve(options))
    narrow, wide = task.cfg.teachers
    assert (narrow.name, narrow.size) == ("narrow", 48)
    assert (wide.name, wide.weight, wide.precision) == ("wide", 2, "fp32")
    chosen, left, unused = capsys.readouterr().out.splitlines()
    assert "within 2 GFLOPs an image: wide (+0.500 for 1 GFLOPs), narrow (+0.125" in chosen
    assert left == "left out: third costs 9 GFLOPs" and "--teachers.third.size" in unused
    named = {k: v for k, v in options.items() if k not in ("budget", "teachers.third.size")}
    assert job.resolve(named | {"teachers": "narrow,wide"}).cfg == task.cfg


@pytest.mark.parametrize(
    "changed",
    [
        {"budget": "3"},
        {"teachers__wide__size": "64"},
        {"among": f"{AMONG},c=timm:x"},
        {"seed": "1"},
    ],
)
def test_a_choice_of_something_else_is_not_taken(
    images: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    keep(given(images, tmp_path), tmp_path, "wide")
    found = teacher_choice.read(tmp_path)
    assert found and found.answers(wanted_by(given(images, tmp_path)))
    assert not found.answers(wanted_by(given(images, tmp_path, **changed)))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"budget": 1}', "null"])
def test_a_damaged_choice_is_none(images: Path, tmp_path: Path, text: str) -> None:
    choice = keep(given(images, tmp_path), tmp_path, "wide")
    assert teacher_choice.read(tmp_path) == choice
    (tmp_path / run_files.CHOICE).write_text(text)
    assert teacher_choice.read(tmp_path) is None


def test_a_run_goes_on_with_its_own_choice_alone(images: Path, tmp_path: Path) -> None:
    options, out = given(images, tmp_path / "run"), tmp_path / "run"
    (out / "checkpoints" / "step_0000001").mkdir(parents=True)
    named = {k: v for k, v in options.items() if k not in ("among", "budget")}
    cfg = job.resolve(named | {"teachers": "wide=python:small_teacher:wide"}).cfg

    (out / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    with pytest.raises(ValueError, match="holds a run, but no choice of its teachers"):
        auto_teachers.resolve(options)
    keep(options, out, "wide")
    assert (
        job.resolve(auto_teachers.resolve(options)).cfg == cfg == recipes.read(out / "config.yaml")
    )
    with pytest.raises(ValueError, match=r"narrow,wide within 2 GFLOPs, now among .* within 3"):
        auto_teachers.resolve(options | {"budget": "3"})
    with pytest.raises(ValueError, match=r"another run \(seed was '0', now '1'\)"):
        job.resolve(auto_teachers.resolve(options | {"seed": "1"}))


def test_nothing_is_compared_beside_a_job_that_trains(images: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another job trains in"):
            auto_teachers.resolve(given(images, tmp_path))


def test_ranks_wait_as_long_as_rank_0_shows_life(images: Path, tmp_path: Path) -> None:
    options = given(images, tmp_path)
    wanted = wanted_by(options)
    assert wanted == wanted_by(options | {"eval.size": "448", "eval.protocol": "dinov2"})
    with pytest.raises(TimeoutError, match="no sign of life from rank 0"):
        auto_teachers.wait_for_choice(tmp_path, wanted, first_s=0.1)
    keep(options | {"budget": "3"}, tmp_path, "wide")  # of an earlier attempt

    def choose() -> None:
        for beat in range(8):
            (tmp_path / auto_teachers.BEAT).write_text(str(beat))
            time.sleep(0.5)
        keep(options, tmp_path, "wide", "narrow")

    rank_0 = threading.Thread(target=choose)
    rank_0.start()
    found = auto_teachers.wait_for_choice(tmp_path, wanted, silence_s=3)
    rank_0.join()
    assert found.chosen == ["wide", "narrow"]
