"""Runs that are trained further than they were started for, and runs that may not be."""

import json
import shutil

import pytest
import yaml
from forked import Forked
from pictures import folder
from runs import TRAIN, curve, kill_on_the_way, launch, run, tiny, together, verb

from unic_ds import config
from unic_ds.config import extension, job, overrides, recipes
from unic_ds.config.overrides import override_all
from unic_ds.engine import optim

EXTEND = {"run.extend": "true"}
LONGER = EXTEND | {"optim.steps": 6}
STAGES = "student.drop_path=0"


def runs(folder, plan, ranks=1):
    """Output of runs in one process, one after another: (name of their folder, settings)."""
    file = folder / "plan.json"
    file.write_text(json.dumps([tiny(folder, out, more) for out, more in plan]))
    return run(together(file, ranks))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A folder with a finished run of three steps, `short`, and one of two stages, `staged`."""
    made = tmp_path_factory.mktemp("extension")
    folder(made / "train", 16)
    folder(made / "val", 8)
    runs(made, [("short", {}), ("staged", {"stages": STAGES, "eval.on": "false"})])
    return made


@pytest.fixture(scope="module")
def extended(short):
    """That folder with the run extended in its own folder and in others, and what this printed."""
    for copy in ("place", "renamed"):
        shutil.copytree(short / "short", short / copy)
    kept = short / "place" / "encoders" / "step_0000003"  # as `unic-ds export` may have written it
    shutil.copytree(short / "short" / "student", kept)
    # As a kill leaves it while results are set aside.
    (short / "renamed" / "results.json").rename(short / "renamed" / "results_step_0000003.json")
    other = LONGER | {"resume": short / "short"}
    stages = {"stages": f"{STAGES} optim.steps=3", "eval.on": "false"}
    plan = [
        ("place", LONGER | {"run.stop_at": 4}),
        ("place", LONGER),
        ("renamed", LONGER | {"eval.on": "false"}),
        ("other", other | {"run.stop_at": 5, "eval.on": "false"}),
        ("other", other | {"eval.on": "false"}),
        ("staged", LONGER | stages | {"optim.steps": 4}),
    ]
    return short, runs(short, plan)


def test_an_extended_run_learns_by_the_schedule_of_its_new_length(extended):
    made, printed = extended
    before, after = curve(made / "short"), curve(made / "place")
    assert {step: after[step] for step in before} == before
    assert list(after) == [1, 2, 3, 4, 5, 6]
    cfg = yaml.safe_load((made / "place" / "config.yaml").read_text())
    assert (cfg["optim"]["steps"], cfg["run"]["extend"]) == (6, False)
    schedule = config.Optim(batch_size=8, steps=6, warmup_epochs=0)
    rates = {step: optim.learning_rate(step, schedule, 16) for step in range(4, 7)}
    assert {step: after[step]["lr"] for step in rates} == pytest.approx(rates)
    said = (
        f"extended from step 3 of 3 to 6 steps; the learning rate goes from {before[3]['lr']:.4g}"
    )
    assert f"{said} to {rates[4]:.4g}" in printed
    event, again = map(json.loads, (made / "place" / "events.jsonl").read_text().splitlines())
    assert (again["event"], again["step"], again["ranks"]) == ("resumed", 4, 1)
    assert (event["event"], event["step"], event["of"], event["to"]) == ("extended", 3, 3, 6)


def test_it_is_the_same_in_place_in_another_folder_and_interrupted(extended):
    made, printed = extended
    whole = {step: row for step, row in curve(made / "place").items() if step > 3}
    assert curve(made / "renamed") == curve(made / "place")
    assert curve(made / "other") == whole
    assert printed.count("resumed after step 3 from") == 4
    assert f"resumed after step 5 from {made / 'other'}" in printed
    weights = [
        (made / name / "student" / "model.safetensors").read_bytes()
        for name in ("place", "renamed", "other")
    ]
    assert weights[0] == weights[1] == weights[2]


def test_the_shorter_run_s_results_are_kept(extended):
    made, printed = extended
    old = made / "short"
    for name, student in (("place", "step_0000003_2"), ("renamed", "step_0000003")):
        kept = made / name / "results_step_0000003.json"
        assert kept.read_bytes() == (old / "results.json").read_bytes()
        assert (made / name / "results_step_0000003.png").is_file()
        for file in (old / "student").iterdir():
            aside = made / name / "encoders" / student / file.name
            assert aside.read_bytes() == file.read_bytes()
        assert (made / name / "results.json").is_file()
    assert "It trained 6 steps" in run(verb("doctor", made / "place"))
    # The same command again only shows the table.
    printed = run(Forked(1, [TRAIN, *tiny(made, "place", LONGER)]))
    assert "is finished" in printed
    assert "student after" in printed


def test_the_last_stage_is_extended(extended):
    made, printed = extended
    assert list(curve(made / "staged")) == [1, 2, 3, 4]
    assert list(curve(made / "staged" / "stage1")) == [1, 2, 3]
    assert "extended from step 3 of 3 to 4 steps" in printed


def refused(made, out, **more):
    """The sentence by which a command line is refused at once."""
    given = {key.replace("__", "."): value for key, value in more.items()}
    line = tiny(made, out, given)
    options = {key[2:]: value for key, value in zip(line[::2], line[1::2], strict=True)}
    with pytest.raises(ValueError) as error:
        job.resolve(options)
    return str(error.value)


@pytest.mark.parametrize(
    ("out", "more", "sentences"),
    [
        ("short", {"optim__steps": 6}, ["optim.steps was '3', now '6'", "choose another --out"]),
        ("short", {"run__extend": "true", "optim__lr": 1}, ["optim.lr was '0.0003', now '1.0'"]),
        ("new", {"resume": "short", "optim__steps": 6}, ["--optim.steps '3', this run has '6'"]),
        ("new", {"resume": "short", "seed": 1}, ["was saved with --seed '0', this run has '1'"]),
        (
            "new",
            {"resume": "short/checkpoints/step_0000002", "run__extend": "true", "seed": 1},
            ["was saved with --seed '0'"],
        ),
    ],
)
def test_a_refusal_names_the_ways_that_work(short, out, more, sentences):
    if "resume" in more:
        more = more | {"resume": str(short / more["resume"])}
    said = refused(short, out, **more)
    ways = ["to train longer add --run.extend true", "to start a new run from its weights"]
    for sentence in (*sentences, *ways, f"--student.init {str(short / 'short' / 'student')!r}"):
        assert sentence in said


def test_what_cannot_be_extended_is_refused(short, tmp_path):
    said = refused(short, "short", run__extend="true", optim__steps=2)
    assert "the run is trained to step 3, and --optim.steps 2 means 2 steps in all" in said
    assert "holds no run to train further" in refused(short, "new", run__extend="true")
    shutil.copytree(
        short / "short", tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints")
    )
    said = refused(short, tmp_path / "bare", run__extend="true", optim__steps=6)
    assert "has no checkpoint left to be extended from" in said
    said = refused(short, "staged", run__extend="true", optim__steps=6, stages=STAGES)
    assert "an earlier stage is not trained longer" in said
    assert "--stages, as in 'optim.steps=3'" in said
    printed = run(
        Forked(1, [TRAIN, *tiny(short, "short", {"optim.steps": 0, "optim.epochs": 1} | EXTEND)]),
        code=2,
    )
    assert "trained to step 3, and --optim.epochs 1 means 2 steps in all" in printed
    assert (short / "short" / "results.json").is_file()


@pytest.mark.lengthy
@pytest.mark.slow
@pytest.mark.dist
def test_killed_on_the_way_under_the_launcher_it_goes_on(short):
    """With two ranks, from the checkpoint of one; then killed at any moment and started again."""
    more = EXTEND | {"optim.steps": 12, "resume": short / "short", "eval.on": "false"}
    run(Forked(2, [TRAIN, *tiny(short, "forked", more)]))
    command = launch(TRAIN, *tiny(short, "killed", more))
    kill_on_the_way(command, short / "killed", 10)
    assert not (short / "killed" / "student").exists()
    run(launch(TRAIN, *tiny(short, "killed", more)))
    assert curve(short / "killed") == curve(short / "forked")
    assert list(curve(short / "killed")) == list(range(4, 13))


OLD_NAMES = {"student": "checkpoint", "ladder": "recompute"}


def old_run(folder, cfg):
    """A run folder as versions before the renaming of two options wrote it."""
    plain = overrides.to_dict(cfg)
    for section, old in OLD_NAMES.items():
        plain[section][old] = plain[section].pop("activation_checkpointing")
    del plain["plugins"]
    saved = folder / "checkpoints" / "step_0000003"
    saved.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    facts = {f"--{key}": text for key, text in overrides.science(cfg).items()}
    (saved / "run.json").write_text(json.dumps(facts | {"step": 3, "--ladder.recompute": "all"}))
    return saved


def test_a_run_of_before_the_renaming_is_resumed(tmp_path):
    """By the same options with old or new names, in its folder or by --resume."""
    teachers = {"teachers": "a=timm:vit_tiny_patch16_224", "stages": "student.checkpoint=full"}
    cfg = override_all(config.Config(), teachers | {"student.checkpoint": "every:2"})
    saved = old_run(tmp_path / "run", cfg)
    assert recipes.read(tmp_path / "run" / "config.yaml") == cfg
    extension.check(cfg, tmp_path / "run", resume="auto", last=True)
    for resume in (tmp_path / "run", saved):
        extension.check(cfg, tmp_path / "new", resume=str(resume), last=True)
    found = extension.find(tmp_path / "new", str(saved))
    assert found.science["ladder.activation_checkpointing"] == "all"
    stages = [stage.student.activation_checkpointing for stage, _ in job.staged(cfg, tmp_path)]
    assert stages == ["full", "every:2"]
    other = override_all(cfg, {"optim.lr": "1"})
    with pytest.raises(ValueError, match=r"optim.lr was '0.0003', now '1.0'"):
        extension.check(other, tmp_path / "run", resume="auto", last=True)
