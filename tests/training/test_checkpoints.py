"""Checkpoints of real runs: harmed, resumed by other ranks and ZeRO stages, kept and forgotten."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from ds_settings import ds_settings
from runs import TINY_MODELS, curve, run, start, together

from unic_ds import config
from unic_ds.engine import reshard
from unic_ds.training import checkpoint

STEPS = 6
RUN = TINY_MODELS | {
    "teachers.narrow.precision": "fp32",
    "teachers.wide.precision": "fp32",
    "optim.lr": "1e-3",
    "optim.lr_scaling": "none",
    "optim.warmup_epochs": "0.02",
    "optim.clip": 0.3,
    "optim.ema": 0.9,
    "optim.layer_decay": 0.8,
    "optim.steps": STEPS + 1,
    "run.stop_at": STEPS,  # nothing is exported
    "run.log_every": 1,
    "run.save_every": 2,
    "run.keep_last": 9,
}
HALF = {"optim.ema": 0, "optim.lr": "1e-4", "ladder.rungs": "5", "ladder.width": 48}
NEWEST, NEXT = "step_0000004", "step_0000006"


def words(folder, name, stage, **more):
    """The command line of a run `name` under `folder`."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 1000}
    if "offload" in name:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    settings = ds_settings(8, zero, bf16={"enabled": "bf16" in name})
    file = folder / f"{name}.json"
    file.write_text(json.dumps(settings))
    pairs = RUN | (HALF if "bf16" in name else {}) | {"ds_config": file, "out": folder / name}
    pairs |= {key.replace("__", "."): value for key, value in more.items()}
    return [word for key, value in pairs.items() for word in (f"--{key}", str(value))]


def command(folder, ranks, plan, script="many_runs.py"):
    """One start of so many ranks that makes the planned runs one after another."""
    file = folder / f"plan_{time.monotonic_ns()}.json"
    file.write_text(json.dumps(plan))
    return together(file, ranks, script)


def after(folder, name, step):
    return folder / name / "checkpoints" / f"step_{step:07d}"


@pytest.fixture(scope="module")
def sources(demonstration, tmp_path_factory):
    """Two ranks: unharmed runs in fp32 and bf16, and runs of the other stages that stop early."""
    folder = tmp_path_factory.mktemp("checkpoints")
    plan = [words(folder, "whole", 2), words(folder, "bf16_whole", 1)]
    plan += [words(folder, f"2_zero{z}", z, run__stop_at=2) for z in (0, 1, 3)]
    plan += [words(folder, "2_offload", 3, run__stop_at=2)]
    printed = run(command(folder, 2, plan))
    assert "saved step_0000006 in " in printed
    return folder


@pytest.fixture(scope="module")
def harmed(sources):
    """Folders that stopped at step 4, each harmed in its way; what the failing runs printed."""
    names = ("truncated", "unreadable", "no_manifest", "leftover", "killed", "read_only", "full")
    for name in names:
        later = shutil.ignore_patterns(NEXT, "latest", "tb")
        shutil.copytree(sources / "whole", sources / name, ignore=later)
    shard = next(after(sources, "truncated", 4).glob("zero/*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    shard = next(after(sources, "unreadable", 4).glob("zero/*optim_states.pt"))
    shard.unlink()
    shard.symlink_to("/proc/self/mem")  # reading this is an I/O error
    (after(sources, "no_manifest", 4) / checkpoint.MANIFEST).unlink()
    left = sources / "leftover" / "checkpoints" / f".saving_{NEXT}" / "zero"
    shutil.copytree(after(sources, "whole", 6) / "zero", left)
    kill_while_saving(sources)
    with small_disks(sources) as printed:
        yield sources, printed


def kill_while_saving(folder):
    """SIGKILL one of two ranks once the save has begun to write."""
    process = start(command(folder, 2, [words(folder, "killed", 2)]))
    writing = folder / "killed" / "checkpoints" / f".saving_{NEXT}" / "zero"
    while not writing.exists():  # without a pause: a save of this size takes a tenth of a second
        assert process.poll() is None, process.communicate()[0][-3000:]
    os.kill(max(process.ranks()), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert names_in(folder, "killed") == {"step_0000002", NEWEST}


@contextmanager
def small_disks(folder):
    """Checkpoints on file systems of their own, one read-only, one without room for all files of a
    save. Yields what the failing runs printed, the disks being well again.
    """
    if os.geteuid():
        yield ""
        return
    names = ("read_only", "full")
    disks = [folder / name / "checkpoints" for name in names]
    mounted = []
    try:
        for disk in disks:
            saved = Path(shutil.move(disk, f"{disk}_moved"))
            disk.mkdir()
            mount("-t", "tmpfs", "none", disk)
            mounted.append(disk)
            shutil.copytree(saved, disk, dirs_exist_ok=True)
        mount("-o", "remount,ro", disks[0])
        found = os.statvfs(disks[1])
        # its folder, one more in it, and two of the three files of the ranks
        room = found.f_files - found.f_ffree + 4
        mount("-o", f"remount,nr_inodes={room}", disks[1])
        plan = [words(folder, name, 2) for name in names]
        printed = run(command(folder, 2, plan, "failing_runs.py"), code=1)
        assert names_in(folder, "full") == names_in(folder, "read_only") == {"step_0000002", NEWEST}
        mount("-o", "remount,rw", disks[0])
        mount("-o", f"remount,nr_inodes={room + 1000}", disks[1])
        yield printed
    finally:
        for disk in mounted:
            subprocess.run(["umount", str(disk)], check=True)


def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True)


def names_in(folder, name):
    return {path.name for path in (folder / name / "checkpoints").glob("step_*")}


@pytest.fixture(scope="module")
def moved(sources):
    """Runs on one rank and on four that go on from the sources; what they printed."""
    plan = [
        words(sources, "1_zero3", 3, resume=after(sources, "2_zero0", 2), run__stop_at=4),
        words(sources, "1_zero0", 0, resume=after(sources, "whole", 2), run__stop_at=4),
        words(sources, "1_bf16", 3, resume=after(sources, "bf16_whole", 2), run__stop_at=4),
    ]
    printed = run(command(sources, 1, plan))
    plan = [
        words(sources, "4_zero2", 2, resume=after(sources, "1_zero3", 4), run__stop_at=5),
        words(sources, "4_zero0", 0, resume=after(sources, "2_zero3", 2), run__stop_at=4),
    ]
    return printed + run(command(sources, 4, plan))


@pytest.fixture(scope="module")
def ended(harmed, moved):
    """Every run at its end: the harmed ones by their own command, the moved ones moved again."""
    folder, failed = harmed
    names = ["truncated", "unreadable", "no_manifest", "leftover", "killed"]
    names += ["read_only", "full"] if failed else []
    plan = [words(folder, name, 2) for name in names]
    plan += [
        words(folder, "2_zero3_end", 3, resume=after(folder, "4_zero2", 5)),
        words(folder, "2_zero1_end", 1, resume=after(folder, "1_zero0", 4)),
        words(folder, "2_bf16_end", 2, resume=after(folder, "1_bf16", 4)),
        words(folder, "2_offload", 3),
        words(folder, "2_offload_end", 3, resume=after(folder, "whole", 2)),
    ]
    printed = moved + run(command(folder, 2, plan))
    plan = [
        words(folder, "1_zero2_end", 2, resume=after(folder, "2_zero1", 2)),
        words(folder, "1_zero0_end", 0, resume=after(folder, "4_zero0", 4)),
    ]
    return folder, printed + run(command(folder, 1, plan)), failed


def assert_ended_as_unharmed(folder, name):
    """The curve and every byte of the last checkpoint of the run that nobody harmed."""
    assert curve(folder / name) == curve(folder / "whole")
    hashes = [after(folder, run, STEPS) / checkpoint.MANIFEST for run in (name, "whole")]
    assert hashes[0].read_text() == hashes[1].read_text()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault(
    "a file of the newest checkpoint cut short", "named; the previous one is resumed"
)
def test_a_truncated_file(ended):
    folder, printed, _ = ended
    assert f"checkpoint {NEWEST} is damaged (zero/" in printed
    assert f"resumed after step 2 from {after(folder, 'truncated', 2)}" in printed
    assert_ended_as_unharmed(folder, "truncated")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault(
    "a file of the newest checkpoint gives I/O errors", "named; the previous one is read"
)
def test_a_file_that_cannot_be_read(ended):
    folder, printed, _ = ended
    assert "optim_states.pt cannot be read: Input/output error); trying the previous one" in printed
    assert f"resumed after step 2 from {after(folder, 'unreadable', 2)}" in printed
    assert_ended_as_unharmed(folder, "unreadable")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault("the newest checkpoint's manifest lost", "named; the previous one is resumed")
def test_no_manifest(ended):
    folder, printed, _ = ended
    assert f"checkpoint {NEWEST} is damaged (no readable manifest.json)" in printed
    assert f"resumed after step 2 from {after(folder, 'no_manifest', 2)}" in printed
    assert_ended_as_unharmed(folder, "no_manifest")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault("leftovers of an interrupted save", "ignored, then removed by the next save")
def test_leftovers(ended):
    folder, printed, _ = ended
    assert f"resumed after step 4 from {after(folder, 'leftover', 4)}" in printed
    assert not list((folder / "leftover" / "checkpoints").glob(".*"))
    assert_ended_as_unharmed(folder, "leftover")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault("a rank killed while it saves", "the job ends; resumed from the previous one")
def test_a_rank_killed_while_saving(ended):
    folder, printed, _ = ended
    assert f"resumed after step 4 from {after(folder, 'killed', 4)}" in printed
    assert_ended_as_unharmed(folder, "killed")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault("the checkpoints' disk turns read-only", "exit 1, named; resumed when mended")
def test_no_permission(ended):
    folder, printed, failed = ended
    if not failed:
        pytest.skip("mounting a disk needs root")
    assert f"cannot save {NEXT} to" in failed
    assert "Read-only file system" in failed
    asked = int(re.search(r"it takes (\d+) MB", failed)[1])
    written = json.loads((after(folder, "whole", 6) / checkpoint.MANIFEST).read_text())
    assert asked * 1e6 > sum(file["bytes"] for file in written.values())
    assert f"resumed after step 4 from {after(folder, 'read_only', 4)}" in printed
    assert_ended_as_unharmed(folder, "read_only")


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of a kind and of so many MB on a folder of its own."""
    mounted = []

    def of(kind, megabytes):
        folder, device, size = tmp_path / kind, "none", f"size={megabytes}m"
        folder.mkdir()
        if kind != "tmpfs":
            device, size = tmp_path / f"{kind}.img", "loop"
            device.touch()
            os.truncate(device, megabytes << 20)
            subprocess.run([f"mkfs.{kind}", "-q", "-F", str(device)], check=True)
        try:
            mount("-t", kind, "-o", size, device, folder)
        except subprocess.CalledProcessError:
            if kind == "tmpfs":
                raise
            pytest.skip("this machine has no loop devices")
        mounted.append(folder)
        return folder

    yield of
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
def test_room_is_asked_for_before_anything_is_written(disk):
    small = disk("tmpfs", 8)
    (small / NEWEST).mkdir()
    checkpoint.create_partial(small / f".saving_{NEXT}", 4 << 20)
    with pytest.raises(OSError, match=r"No space left.* it takes 17 MB.* good checkpoint is step_"):
        checkpoint.create_partial(small / f".saving_{NEXT}", 16 << 20)
    assert [path.name for path in small.iterdir()] == [NEWEST]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
@pytest.mark.skipif(not shutil.which("mkfs.ext2"), reason="e2fsprogs is not installed")
def test_what_is_free_is_looked_at_where_nothing_can_be_set_aside(disk):
    """ext2 has no fallocate, as NFS before 4.2 has none."""
    dumb = disk("ext2", 16)
    checkpoint.create_partial(dumb / f".saving_{NEXT}", 8 << 20)
    with pytest.raises(OSError, match=r"1\d MB are free; it takes 17 MB"):
        checkpoint.create_partial(dumb / f".saving_{NEXT}", 16 << 20)
    assert [path.name for path in dumb.iterdir()] == ["lost+found"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault("the disk fills up while a save writes", "exit 1, named; resumed with room")
def test_a_full_disk(ended):
    folder, printed, failed = ended
    if not failed:
        pytest.skip("mounting a disk needs root")
    assert f"cannot save {NEXT} (" in failed
    assert f"the last good checkpoint is {NEWEST}" in failed
    assert f"resumed after step 4 from {after(folder, 'full', 4)}" in printed
    assert_ended_as_unharmed(folder, "full")


ENDED = ("2_zero3_end", "2_zero1_end", "2_offload_end", "1_zero2_end", "1_zero0_end")
RESUMED = ("1_zero3", "1_zero0", "4_zero2", "4_zero0", *ENDED)


@pytest.mark.dist
@pytest.mark.slow
def test_other_ranks_and_stages_go_on_with_the_same_curve(ended):
    folder, printed, _ = ended
    assert printed.count("resharded for") == len(RESUMED) + 2
    assert "saved by 2 ranks, ZeRO-0; resharded for 1 rank, ZeRO-3" in printed
    assert f"resumed after step 2 from {after(folder, '2_offload', 2)}" in printed
    whole = curve(folder / "whole")
    assert {step for name in RESUMED for step in curve(folder / name)} == {3, 4, 5, 6}
    for name in (*RESUMED, "2_offload"):
        for step, row in curve(folder / name).items():
            assert row["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5), (name, step)
            if row["grad_norm"] is not None:  # ZeRO-0 in fp32 tells none
                assert row["grad_norm"] == pytest.approx(whole[step]["grad_norm"], rel=1e-4)


@pytest.mark.dist
@pytest.mark.slow
def test_the_average_of_the_weights_moves_along(ended):
    folder, *_ = ended
    whole = reshard.ZeroShards(after(folder, "whole", STEPS) / "zero")
    average, masters = whole.full("average"), whole.full("")
    assert largest_gap(average, masters) > 1e-3  # another thing than the weights
    for name in (*ENDED, "2_offload"):
        shards = after(folder, name, STEPS) / "zero"
        saved = (reshard.PlainState if "zero0" in name else reshard.ZeroShards)(shards)
        assert saved.step == STEPS
        assert largest_gap(saved.full("average"), average) < 1e-6, name
        assert largest_gap(saved.full(""), masters) < 1e-5, name


def largest_gap(one, other):
    """The largest difference of a trained weight's numbers."""
    names = [n for n in one if "mlp.fc1.weight" in n]
    assert len(names) >= 6
    return max((one[n].contiguous() - other[n].contiguous()).abs().max().item() for n in names)


@pytest.mark.dist
@pytest.mark.slow
def test_masters_of_bf16_move_along(ended):
    folder, *_ = ended
    whole = curve(folder / "bf16_whole")
    for name in ("1_bf16", "2_bf16_end"):
        for step, row in curve(folder / name).items():
            assert row["loss"] == pytest.approx(whole[step]["loss"], rel=1e-3), (name, step)


def make(folder, losses):
    """Checkpoints of steps 1, 2, ... with these training losses, and no more in them."""
    for step, loss in enumerate(losses, 1):
        (folder / f"step_{step:07d}").mkdir()
        facts = {"step": step} | ({} if loss is None else {"loss": loss})
        (folder / f"step_{step:07d}" / checkpoint.FACTS).write_text(json.dumps(facts))


@pytest.mark.parametrize("better, kept", [("higher", [3, 6]), ("lower", [1, 6])])
def test_the_best_by_a_probe_are_kept(tmp_path, better, kept):
    make(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6])  # step 2 had no probe, 4 another one
    for step, value in ((1, 50.0), (3, 70.0), (4, None), (5, float("nan"))):
        file = tmp_path / f"step_{step:07d}" / checkpoint.FACTS
        row = {"probe/knn": {"value": value, "better": better}} if value else {"probe/x": {}}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"probe": row}))
    keep = config.Run(keep_last=1, keep_best=1, best_by="probe/knn")
    checkpoint.remove_old(tmp_path, tmp_path / "step_0000006", keep)
    assert [int(path.name[5:]) for path in sorted(tmp_path.iterdir())] == kept


@pytest.mark.parametrize(
    "keep, expected",
    [
        ({}, [7, 8]),
        ({"keep_last": 1}, [8]),
        ({"keep_last": 1, "keep_every": 3}, [3, 6, 8]),
        ({"keep_last": 1, "keep_best": 2}, [2, 6, 8]),
        ({"keep_last": 3, "keep_every": 4, "keep_best": 1}, [4, 6, 7, 8]),
    ],
)
def test_what_is_kept(tmp_path, keep, expected):
    make(tmp_path, [None, 0.5, float("nan"), 0.9, 0.8, 0.5, 0.6, 0.7, 0.1])
    (tmp_path / ".saving_step_0000005" / "zero").mkdir(parents=True)
    (tmp_path / "step_of_mine").mkdir()
    checkpoint.remove_old(tmp_path, tmp_path / "step_0000008", config.Run(**keep))
    names = {f"step_{step:07d}" for step in expected}  # step 9 was of a branch that was given up
    assert {path.name for path in tmp_path.iterdir()} == names | {"step_of_mine"}
