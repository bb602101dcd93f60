"""Whole runs in real processes: real teachers and images, the deepspeed launcher, two ranks, kill
-9.
"""

import hashlib
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import (
    AS_SHIPPED,
    DEMONSTRATION,
    FINISHED,
    LOST,
    PARTIAL,
    ROOT,
    SUPPORT,
    TRAIN,
    alone,
    curve,
    kill_on_the_way,
    launch,
    launched,
    options,
    run,
    verb,
)
from safetensors.torch import load_file

from unic_ds import demo
from unic_ds.training import checkpoint

pytestmark = DEMONSTRATION


def test_the_main_command_trains_evaluates_and_exports(finished):
    out, printed = finished
    assert "first optimiser step done" in printed
    rows = json.loads((out / "results.json").read_text())
    assert list(rows) == ["pixels", "effnet", "dinov2", "student before", "student after"]
    for name, row in rows.items():
        assert name in printed
        assert min(row["knn"], row["linear"]) > 35  # four classes: chance is 25
    assert rows["dinov2"] != rows["effnet"]
    assert min(rows["dinov2"]["knn"], rows["effnet"]["knn"]) > rows["pixels"]["knn"]


def test_the_run_folder_holds_what_it_should(finished):
    out, _ = finished
    assert yaml.safe_load((out / "config.yaml").read_text())["optim"]["steps"] == 4
    teachers = json.loads((out / "teachers.json").read_text())
    assert list(teachers) == ["effnet", "dinov2"]
    assert all(len(row["sha256"]) == 64 for row in teachers.values())
    steps = sorted(p.name for p in (out / "checkpoints").iterdir() if p.is_dir())
    assert steps == ["step_0000002", "step_0000004"]
    assert (out / "checkpoints" / "latest").read_text() == "step_0000004"
    assert list((out / "tb").glob("events.*"))
    assert (out / "results.png").stat().st_size > 10_000
    names = {p.name for p in (out / "student").iterdir()}
    assert names == {"README.md", "config.json", "ladder.json", *MODEL}
    row = curve(out)[4]
    wanted = {"loss", "samples", "lr", "grad_norm", "bad_images"}
    wanted |= {
        f"{t}/{k}"
        for t in teachers
        for k in ("cls_cosine", "patch_cosine", "cls_smooth_l1", "kept")
    }
    assert wanted <= row.keys()
    assert row["samples"] == 4 * 16


MODEL = tuple(f"{part}.safetensors" for part in ("model", "ladder", "statistics"))


def test_the_exported_encoder_is_timm_s(finished):
    out, _ = finished
    weights = str(out / "student" / "model.safetensors")
    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=0, checkpoint_path=weights
    )
    assert encoder.embed_dim == 192
    assert timm.create_model(f"local-dir:{out / 'student'}", pretrained=True).num_classes == 0


def test_the_export_verb_gives_the_same_folder_from_the_shards(finished, tmp_path):
    out, _ = finished
    run(verb("export", "--run", out, "--out", tmp_path / "again"))
    for name in MODEL:
        files = (out / "student" / name, tmp_path / "again" / name)
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.slow
def test_the_export_verb_hands_a_run_over_in_int8(finished, tmp_path):
    out, new = finished[0], tmp_path / "a folder"
    wishes = ("--to", "onnx", "--quantize", "int8", "--keep_projectors", "dinov2")
    printed = run(verb("export", out, *wishes, "--out", new))
    assert printed.splitlines()[-1] == str(new)
    notes = re.findall(r"^(?:mean cosine of int8|kNN) .*", printed, re.M)
    assert re.search(r"images of the run: cls (0\.9|1\.0).* dinov2_patch (0\.9|1\.0)", notes[0])
    assert re.search(r"and \d+ validation images\): [\d.]+ % in fp32, [\d.]+ % in int8", notes[1])
    card = (new / "README.md").read_text()
    assert all(f"- {note}\n" in card for note in notes) and "images of its training run" in card
    assert "| dinov2 | " in card and "| `dinov2_cls` | " in card and "| `dinov2_patch` | " in card

    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(out / "config.yaml", bare)
    assert "holds no checkpoint yet" in run(verb("export", bare, "--to", "hf"), code=2)
    assert [p.name for p in bare.iterdir()] == ["config.yaml"]
    refused = run(verb("export", out, "--to", "onnx", "--keep_projectors", "dino"), code=2)
    assert "'dino' (did you mean dinov2?); the ladder's teachers are effnet, dinov2" in refused


@pytest.mark.slow
def test_a_second_stage_starts_from_the_first_s_student_at_another_resolution(finished, tmp_path):
    first, out = finished[0] / "student", tmp_path / "second"
    more = {"student__size": 48, "teachers__dinov2__size": 42}
    more |= {"optim__steps": 2, "optim__lr": 1e-9, "eval__on": "false"}  # what it starts from stays
    printed = run(alone(out, **more, student__init=first, run__stop_at=1))
    assert "position embeddings resized from 2 x 2 to 3 x 3" in printed
    assert f"starts from {first}: encoder, ladder, statistics" in printed

    moved = Path(shutil.copytree(first, tmp_path / "moved"))
    bare = moved / "model.safetensors"  # without ladder and statistics
    printed = run(alone(out, **more, student__init=bare), code=2)
    assert "was saved with init {'model.safetensors': '" in printed
    assert "this run has None" in run(alone(out, **more), code=2)
    printed = run(alone(out, **more, student__init=tmp_path / "none"), code=2)
    assert "is no model folder and no .safetensors file" in printed

    assert "resumed after step 1" in run(alone(out, **more, student__init=moved))
    for part in ("model.safetensors", "ladder.safetensors"):
        ours, theirs = load_file(out / "student" / part), load_file(first / part)
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"pos_embed"}:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7)


@pytest.mark.slow
def test_a_pruned_student_is_distilled_further(finished, tmp_path):
    """Its folder is timm's with the architecture beside; the run needs the shape of its blocks."""
    small, out = tmp_path / "pruned", tmp_path / "further"
    printed = run(verb("export", finished[0], "--prune", "0.3", "--out", small))
    assert re.search(r"pruned to 2 of 3 heads and 536 of 768 MLP .* cls 0\.9", printed)
    for name in ("README.md", "ladder.json"):  # ladder.json tells it to the next export's card
        assert "pruned by 30 % and not trained since" in (small / name).read_text()
    shape = f"--student.init {small} --student.heads 2 --student.mlp_width 536"
    assert shape in printed and printed.splitlines()[-1] == str(small)
    more = {"optim__steps": 2, "optim__lr": 1e-9, "eval__on": "false", "student__init": small}
    assert "is a pruned student; give the run" in run(alone(out, **more), code=2)
    assert not out.exists()

    printed = run(launched(out, zero="zero3", **more, student__heads=2, student__mlp_width=536))
    assert f"starts from {small}: encoder, ladder, statistics" in printed
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out / "student", small))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-7)
    card = (out / "student" / "README.md").read_text()
    assert "`vit_tiny_patch16_224` with 2 attention heads and 536 MLP channels in each" in card
    student = torch.hub.load(str(ROOT), "student", str(out), source="local")
    assert student.blocks[3].attn.proj.in_features == 128
    printed = run(verb("export", out, "--to", "onnx", "--prune", "0.3"))
    assert "--student.init" not in printed  # onnx starts no run
    assert "pruned to 1 of 2 heads and 376 of 536 MLP channels" in printed
    assert printed.splitlines()[-1].endswith("onnx_pruned30")
    assert "another width than its tokens" in run(verb("export", out, "--to", "hf"), code=2)


def test_a_finished_run_prints_its_table_at_once(finished):
    out, _ = finished
    begun = time.monotonic()
    printed = run(alone(out, **FINISHED))
    assert "student after" in printed
    assert time.monotonic() - begun < 5


def test_a_folder_of_another_run_is_refused_naming_the_keys(finished):
    out, _ = finished
    printed = run(alone(out, **FINISHED, optim__lr="0.5"), code=2)
    assert "optim.lr was '0.002', now '0.5'" in printed
    printed = run(alone(out, **FINISHED, resume="never"), code=2)
    assert "holds a run already" in printed


def test_kill_9_and_the_same_command_give_the_same_curve(tmp_path):
    """On a mixture of a folder and shards, over the end of an epoch."""
    images = few_images(tmp_path, 40)
    pack = verb("pack", images, tmp_path / "pack", "--shard_mb", 1)
    assert "160 images in" in run(pack)
    more = {"data__train": f"{images}=0.5,{tmp_path / 'pack'}"}
    more |= {"optim__batch_size": 24, "optim__steps": 12, "run__save_every": 3, "eval__on": "false"}
    run(alone(tmp_path / "whole", **more))
    kill_on_the_way(alone(tmp_path / "killed", **more), tmp_path / "killed", 10)
    assert not (tmp_path / "killed" / "student").exists()
    assert "resumed after step" in run(alone(tmp_path / "killed", **more))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    shard = next((out / "checkpoints" / "step_0000004" / "zero").glob("*optim_states.pt"))
    with shard.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    printed = run(alone(out, **PARTIAL))
    assert "step_0000004 is damaged" in printed
    assert "resumed after step 2" in printed
    assert set(curve(out)) == set(range(1, 7))


def test_no_room_to_save_leaves_the_last_good_checkpoint(stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    limited = [
        "bash",
        "-c",
        'ulimit -f 20000; exec "$@"',
        "_",
        *(sys.executable, TRAIN, *options(out, **PARTIAL)),
    ]  # 20 MB a file
    printed = run(limited, code=1)
    assert "cannot save step_0000006" in printed
    assert "the last good checkpoint is step_0000004" in printed
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names == {"step_0000002", "step_0000004", "latest"}
    assert "resumed after step 4" in run(alone(out, **PARTIAL))


def test_a_checkpoint_of_other_images_is_refused(stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    images = tmp_path / "images"
    for folder in sorted(
        Path(yaml.safe_load((out / "config.yaml").read_text())["data"]["train"]).iterdir()
    ):
        if folder.is_dir():
            (images / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:100]:
                (images / folder.name / file.name).symlink_to(file)
    printed = run(alone(out, **PARTIAL, data__train=images), code=2)
    assert "was saved with images" in printed
    assert (out / "teachers.json").read_bytes() == (stopped / "teachers.json").read_bytes()


def test_a_checkpoint_s_path_starts_another_run_and_is_not_gone_back_to(stopped, tmp_path):
    older = Path(shutil.copytree(stopped / "checkpoints" / "step_0000002", tmp_path / "older"))
    facts = json.loads((older / "run.json").read_text())
    assert facts.pop("--student.heads") == "0"  # a version before had no such options
    assert facts.pop("--teachers.dinov2.resize") == facts.pop("--teachers.effnet.resize") == "image"
    (older / "run.json").write_text(json.dumps(facts))
    (older / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.hash_files(older)))
    more = PARTIAL | {"resume": older, "run__stop_at": 4}
    assert "resumed after step 2" in run(alone(tmp_path / "branch", **more))
    assert "resumed after step 4" in run(alone(tmp_path / "branch", **more | {"run__stop_at": 5}))
    printed = run(alone(tmp_path / "other", **PARTIAL, resume=older, optim__lr="0.5"), code=2)
    assert "was saved with --optim.lr '0.002', this run has '0.5'" in printed
    printed = run(alone(tmp_path / "other", **PARTIAL, resume=older, student__heads=2), code=2)
    assert "was saved with --student.heads '0', this run has '2'" in printed
    assert not (tmp_path / "other" / "config.yaml").exists()


def test_every_zero_stage_trains_and_agrees(tmp_path):
    """fp32, drop path on: one loss curve whatever the stage; bf16 offload trains too. One launch of
    two ranks.
    """
    plan = []
    # ZeRO-3 comes first: in a fresh process its student is made before there is an engine.
    for zero in ("zero3", "zero1", "zero2"):
        plan.append(options(tmp_path / zero, zero=zero, optim__steps=3, eval__on="false"))
    plan.append(
        options(
            tmp_path / "offload",
            zero="zero3_offload",
            precision="",
            optim__steps=3,
            eval__on="false",
        )
    )
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run(launch(SUPPORT / "many_runs.py", tmp_path / "plan.json"))
    curves = [curve(tmp_path / zero) for zero in ("zero1", "zero2", "zero3")]
    for step in (1, 2, 3):
        losses = [c[step]["loss"] for c in curves]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for part in MODEL:
        ours, theirs = (load_file(tmp_path / z / "student" / part) for z in ("zero3", "zero1"))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)
    offload = curve(tmp_path / "offload")
    assert offload[3]["loss"] == pytest.approx(curves[0][3]["loss"], rel=2e-2)  # bf16 beside fp32
    assert (tmp_path / "offload" / "student" / "model.safetensors").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("zero", ["zero2", "zero3", "zero3_offload"])
def test_a_gpu_takes_steps_under_the_shipped_files(tmp_path, zero):
    run(alone(tmp_path / "run", zero=zero, **AS_SHIPPED, optim__steps=3, eval__on="false"))
    losses = [row["loss"] for row in curve(tmp_path / "run").values()]
    assert len(losses) == 3 and all(0 < loss < 2 for loss in losses)


def few_images(folder, count):
    """So many photographs of each class, as links in a folder below."""
    images = folder / "images"
    for folder in sorted((demo.root() / demo.PARTS[0]).iterdir()):
        (images / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:count]:
            (images / folder.name / file.name).symlink_to(file)
    return images


def spoil(images):
    """One GIF named .jpg, one empty and one cut-off file among them; odd but sound ones beside."""
    folder = next(images.iterdir())
    Image.new("RGB", (30, 30)).save(folder / "gif.jpg", format="GIF")
    (folder / "empty.jpg").write_bytes(b"")
    whole = next(folder.glob("cell*.jpg")).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("CMYK", (40, 50)).save(folder / "cmyk.jpg")
    Image.new("L", (1, 1)).save(folder / "one_pixel.jpg")


def test_broken_images_cost_themselves_and_too_many_stop_the_run(tmp_path):
    images = few_images(tmp_path, 120)
    spoil(images)
    more = {"data__train": images, "optim__batch_size": 64, "optim__steps": 8}
    more["eval__on"] = "false"
    printed = run(alone(tmp_path / "on", **more, data__bad_limit=0.02))
    assert "gif.jpg" in printed
    assert curve(tmp_path / "on")[8]["bad_images"] == 3
    printed = run(alone(tmp_path / "off", **more, data__bad_limit=0.001), code=2)
    assert "data.bad_limit" in printed
    assert printed.count("empty.jpg") >= 1


def test_teachers_check_tells_what_each_teacher_gives():
    check = verb("teachers", "check", "--recipe", "quickstart")
    printed = run(check)
    for word in ("effnet", "dinov2", "sha256", "Apache-2.0", "1280"):
        assert word in printed
    check = verb("teachers", "check", "--recipe", "quickstart", "--json")
    rows = json.loads(run(check).splitlines()[-1])
    assert rows["dinov2"]["patch_shape"] == [1, 49, 384]


def test_teachers_fetch_tells_sizes_and_hashes():
    rows = json.loads(run(verb("teachers", "fetch", "--json")).splitlines()[-1])
    for row in rows.values():
        file = Path(row["path"])
        assert row["bytes"] == file.stat().st_size
        assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_missing_weights_name_the_fetch_command(tmp_path):
    missing = f"file:{tmp_path}/none.safetensors#arch=vit_tiny_patch16_224"
    printed = run(alone(tmp_path / "run", teachers=f"lost={missing}", **LOST), code=2)
    assert "teachers fetch" in printed
    assert "none.safetensors" in printed
    printed = run(alone(tmp_path / "run", teachers="hub=timm:vit_tiny_patch16_224", **LOST), code=2)
    assert "teachers fetch" in printed
    assert not (tmp_path / "run").exists()
