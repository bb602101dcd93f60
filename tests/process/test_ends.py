"""Ends of real processes: a failure, an interruption, a closed terminal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import LOST as OWN_TEACHERS
from runs import ROOT, SUPPORT, TRAIN, alone, environment, options, ranks_and_port, reached, start

SMALL = OWN_TEACHERS | {
    "recipe": "unic_b",
    "student__model": "vit_tiny_patch16_224",
    "optim__batch_size": "8",
    "optim__steps": "2",
    "optim__warmup_epochs": "0",
    "data__threads": "1",
    "eval__k": "2",
}
NOT_UTF8 = os.fsdecode(b"r\xe9n")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixteen images in two classes, under a path that is not UTF-8."""
    folder = tmp_path_factory.mktemp("images") / NOT_UTF8
    draw = np.random.default_rng(0)
    for number in range(16):
        file = folder / f"c{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (48, 64, 3), np.uint8)).save(file)
    return folder


@pytest.fixture(autouse=True)
def teachers_on_the_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}")


def small(images, teacher, **more):
    """Options of a run that costs little more than its imports."""
    return SMALL | {"data__train": images, "teachers": f"a=python:{teacher}"} | more


def begin(command, **more):
    """A process group of its own, with stdout and stderr apart."""
    return subprocess.Popen(
        command,
        env=environment() | more,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="surrogateescape",  # the deepspeed launcher prints paths as they are
        start_new_session=True,
    )


def steps(process, out, count):
    """Wait until a run has logged so many steps."""
    while reached(out) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def failed(out):
    """The one event of a run that failed."""
    (event,) = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return {key: event[key] for key in ("event", "rank", "step", "phase", "error")}


@pytest.mark.dist
def test_an_error_of_others_is_reported_once_by_ranks_without_a_launcher(images, tmp_path):
    """As under srun. Both fail at once: one prints the traceback, the other a line.

    Unless its watchdog, which wakes every few seconds, has just found that the first has exited.
    """
    out = tmp_path / NOT_UTF8
    words = [sys.executable, TRAIN, *options(out, **small(images, "raising_teacher:build"))]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ranks_and_port(2)[-1], "WORLD_SIZE": "2"}
    meet |= {"LOCAL_WORLD_SIZE": "2", "RAISES": "all:4:KeyError"}
    ranks = [begin(words, **meet, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    short, long = sorted(said, key=len)
    error = r"KeyError: 'no pos_embed\x1b[2J'"
    assert long.count("Traceback") == 1 and long.splitlines()[-1] == error
    assert 'raising_teacher.py", line' in long and "\x1b" not in long
    other = said.index(short)
    assert "Traceback" not in short
    lines = [line for line in short.splitlines() if "KeyError" in line or "unic_ds:" in line]
    assert lines in ([], [f"unic_ds: rank {other}: {error}"])
    at = {"rank": 1 - other, "step": 1, "phase": "teachers", "error": error}
    assert failed(out) == {"event": "failed"} | at


@pytest.mark.dist
@pytest.mark.slow
def test_a_launched_run_without_a_port_reports_the_error_of_one_rank_once(images, tmp_path):
    """Though another job holds the launcher's usual port."""
    launcher = Path(sys.executable).parent / "deepspeed"
    words = [str(launcher), "--num_gpus", "2", TRAIN]
    words += options(tmp_path / "run", **small(images, "raising_teacher:build"))
    with socket.socket() as other:
        with suppress(OSError):  # it is held already
            other.bind(("", 29500))
            other.listen()
        process = begin(words, RAISES="1:5:ValueError")
        _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert said.count("Traceback") == 1
    assert said.count(r"ValueError: no pos_embed\x1b[2J") == 1
    event = failed(tmp_path / "run")
    assert (event["rank"], event["step"]) == (1, 2)


@pytest.mark.dist
@pytest.mark.slow
def test_ctrl_c_reaches_launcher_and_ranks_and_the_run_saves_once(images, tmp_path):
    out, more = tmp_path / "run", {"optim__steps": "3000", "eval__on": "false"}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", TRAIN]
    words += options(out, **small(images, "small_teacher:narrow", **more))
    process = begin(words)
    steps(process, out, 2)
    os.killpg(process.pid, signal.SIGINT)
    printed, said = process.communicate(timeout=120)
    assert "stopped after step " in printed, said
    assert printed.count("saved step_") == 1
    assert said.count("unic_ds: SIGINT: the run saves and stops after this step\n") == 1
    assert (out / "checkpoints" / "latest").exists() and not (out / "events.jsonl").exists()


HANG_UP = pytest.param(signal.SIGHUP, marks=pytest.mark.slow)


@pytest.mark.parametrize("number", [signal.SIGINT, HANG_UP])
def test_a_run_outlives_whoever_reads_it_and_saves_when_interrupted(number, images, tmp_path):
    out, more = tmp_path / "run", {"optim__steps": "3000", "eval__on": "false"}
    words = [sys.executable, TRAIN]
    process = begin([*words, *options(out, **small(images, "small_teacher:narrow", **more))])
    assert "training images" in process.stdout.readline()
    process.stdout.close()
    steps(process, out, 2)
    process.send_signal(number)
    process.send_signal(number)
    said = process.stderr.read()
    assert process.wait(60) == 0, said
    lost, stop = said.splitlines()
    assert "standard output cannot be written (Broken pipe); the run goes on" in lost
    assert stop == f"unic_ds: {number.name}: the run saves and stops after this step"
    assert (out / "checkpoints" / "latest").exists()


def test_a_signal_ends_a_run_that_still_builds_by_one_line(images, tmp_path, monkeypatch):
    monkeypatch.setenv("SLEEPY", "all:1")
    out = tmp_path / "run"
    ranks = start(alone(out, **small(images, "sleepy_teacher:build")))
    while not list(out.glob("heartbeats/rank_*")):
        assert ranks.poll() is None, ranks.communicate()
        time.sleep(0.02)
    time.sleep(0.5)
    ranks.send_signal(signal.SIGINT)
    printed, _ = ranks.communicate(timeout=60)
    assert ranks.returncode == 128 + signal.SIGINT
    said = [line for line in printed.splitlines() if "unic_ds" in line]
    assert said == ["unic_ds: ended by SIGINT; the same command resumes from the newest checkpoint"]
    assert "Traceback" not in printed
    assert failed(out)["phase"] == "building"


@pytest.mark.parametrize(("call", "code"), [(1, 2), (0, 0)])
def test_a_mistake_is_reported_without_the_warnings_of_libraries(
    call, code, images, tmp_path, monkeypatch
):
    """A teacher warns as it is built; one that then fails on its first image is refused."""
    monkeypatch.setenv("RAISES", f"all:{call}:KeyError")
    more = small(images, "raising_teacher:build", eval__on="false")
    ranks = start(alone(tmp_path / "run", **more))
    printed, _ = ranks.communicate(timeout=120)
    assert ranks.returncode == code, printed[-3000:]
    assert printed.count("odd weights") == printed.count("odd keys") == (code == 0)
    assert printed.count("unic_ds: error: ") == (code == 2)


def test_paths_that_are_not_utf8_are_trained_from_and_into(images, tmp_path):
    out = tmp_path / NOT_UTF8
    more = small(images, "small_teacher:narrow", data__val=images)
    for last in ("1", "None"):  # the second start resumes
        ranks = start(alone(out, **more, run__stop_at=last))
        printed, _ = ranks.communicate(timeout=120)
        assert ranks.returncode == 0, printed[-3000:]
    assert r"resumed after step 1 from " in printed and r"/r\udce9n/checkpoints" in printed
    assert set(json.loads((out / "results.json").read_text())) >= {"a", "student after"}
    assert list((out / "tb").iterdir()) and (out / "student" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("stream", "code", "said"),
    [
        ("> /dev/full", 1, "cannot be written (No space left on device)"),
        (">&-", 0, ""),
        ("| true", 0, ""),
    ],
)
def test_a_verb_whose_output_is_lost_fails_only_where_somebody_wanted_it(stream, code, said):
    words = f"set -o pipefail; {sys.executable} -m unic_ds.cli --help {stream}"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stderr and done.stderr.count("\n") == bool(said)
