"""One recipe in stages: each a run of its own that starts from the student before it."""

import pytest
from runs import DEMONSTRATION, curve, kill_on_the_way, run, two, verb
from safetensors.torch import load_file

from unic_ds.config import job, recipes

GIVEN = {
    "ds_config": "ds_configs/zero2.json",
    "teachers": "narrow=python:small_teacher:narrow",
    "data.train": "docs",
}
"""The quickstart's recipe, without its teachers and images."""


def resolved(tmp_path, **more):
    return job.resolve(GIVEN | {"out": str(tmp_path / "run")} | more)


def test_a_stage_is_the_last_one_with_its_own_settings(tmp_path):
    stages = "student.size=32 optim.epochs=9;student.size=64 loss.cls='1 cosine'"
    last = resolved(tmp_path, stages=stages, **{"optim.lr": "0.5"})
    one, two = last.before
    assert [s.cfg.student.size for s in (one, two, last)] == [32, 64, 112]
    assert [s.cfg.optim.epochs for s in (one, two, last)] == [9, 3.9, 3.9]
    assert {s.cfg.optim.lr for s in (one, two, last)} == {0.5}
    assert (two.cfg.loss.cls, last.cfg.loss.patch) == ("1 cosine", last.cfg.loss.cls)
    out = tmp_path / "run"
    assert [s.out for s in (one, two, last)] == [out / "stage1", out / "stage2", out]
    assert [s.init for s in (one, two, last)] == [
        "",
        str(out / "stage1" / "student"),
        str(out / "stage2" / "student"),
    ]


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ("student.sze=32", r"stage 1 of --stages \('student.sze=32'\): unknown option"),
        ("seed=1;optim.epochs=many", r"stage 2 of --stages .* must be a number, got 'many'"),
        ("optim.batch_size=63", "optim.batch_size 63 is not a multiple of 2 ranks"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_at_the_door(monkeypatch, tmp_path, stages, sentence):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=sentence):
        resolved(tmp_path, stages=stages)


def test_a_checkpoint_s_path_does_not_fit_stages(tmp_path):
    with pytest.raises(ValueError, match="is of one stage; add --stages ''"):
        resolved(tmp_path, stages="seed=1", resume=str(tmp_path))


def test_unic_l_has_the_paper_s_stages(tmp_path):
    cfg = recipes.get("unic_l")
    (first, _), (last, _) = job.staged(cfg, tmp_path)
    assert (first.student.size, first.optim.epochs) == (224, 200)
    assert (last.student.size, last.optim.epochs) == (336, 100)


@DEMONSTRATION
@pytest.mark.slow
def test_two_stages_killed_in_the_second_give_the_same_curve(tmp_path):
    more = {
        "stages": "student.size=32 optim.steps=2",
        "student__size": 48,
        "teachers__dinov2__size": 42,
        "optim__steps": 6,
        "run__save_every": 2,
        "eval__on": "false",
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    printed = run(two(whole, **more))
    assert "stage 1 of 2: vit_tiny_patch16_224 at 32 px" in printed
    assert "position embeddings resized from 2 x 2 to 3 x 3" in printed
    assert "encoder, ladder, statistics" in printed
    assert (whole / "stage1" / "student" / "ladder.safetensors").is_file()
    encoder = load_file(whole / "student" / "model.safetensors")
    assert encoder["pos_embed"].shape[1] == 1 + 9

    # Stopped in the first, what looks at a run's folder finds that stage.
    assert "stopped after step 1 of 2" in run(two(killed, **more, run__stop_at=1))
    said = run(verb("doctor", killed))
    assert "stopped. Stage 1 of 2: It stopped on request after step 1 of 2." in said
    assert "it resumes from step_0000001" in said
    exported = killed / "stage1" / "encoders" / "step_0000001"
    assert str(exported) in run(verb("export", "--run", killed))
    assert load_file(exported / "model.safetensors")["pos_embed"].shape[1] == 1 + 4

    kill_on_the_way(two(killed, **more), killed, 5)
    printed = run(two(killed, **more))
    assert "stage 2 of 2" in printed
    assert "stage 1 of 2" not in printed
    for part in (".", "stage1"):
        assert curve(killed / part) == curve(whole / part)
    assert "is finished" in run(two(whole, **more))
