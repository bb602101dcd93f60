"""If a rank is stopped, killed or stalled, the run aborts, names it, and resumes unharmed."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
from runs import (
    DEMONSTRATION,
    LOST,
    ROOT,
    SUPPORT,
    TRAIN,
    curve,
    environment,
    kill_group,
    launched,
    options,
    ranks_and_port,
    reached,
    run,
    saved,
)

from unic_ds.training import heartbeat

SAVE_EVERY = 3
RUN = LOST | {
    "teachers": "sleepy=python:sleepy_teacher:build",
    "teachers__sleepy__precision": "fp32",
    "ladder__rungs": "11",
    "optim__batch_size": "16",
    "optim__steps": "36",
    "run__save_every": f"{SAVE_EVERY}",
    "eval__on": "false",
}
SILENT_S = 8
AWAKE = {"PYTHONPATH": f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}"}


class End(NamedTuple):
    """End of a start in which one rank was stopped or killed."""

    printed: str
    code: int
    rank: int
    pid: int
    took_s: float  # from the harm to the end
    left: list[int]  # ranks whose processes outlive the launcher
    event: dict


def with_torchrun(out, **more):
    """The launcher of torch, for two ranks."""
    port = ranks_and_port(2)[-1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*torchrun, "--master_port", port, TRAIN, *options(out, **more)]


def end_of(out, command, harm=None, rank=1, **env) -> End:
    """Start a run, harm a rank once it has saved and gone on, and see it out."""
    beyond = max(saved(out) + SAVE_EVERY, reached(out)) + 1 if harm else 0
    told: list[heartbeat.Heartbeat] = []
    process = subprocess.Popen(
        command,
        env=environment() | AWAKE | env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        while reached(out) < beyond or len(told) != 2 or any(map(heartbeat.has_exited, told)):
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.02)
            told = heartbeat.read_all(out)
        begun = time.monotonic()
        if harm:
            os.kill(told[rank].pid, harm)
        printed, _ = process.communicate(timeout=300)
        took_s = time.monotonic() - begun
        left = [row.pid for row in told if not heartbeat.has_exited(row)]
    finally:
        if process.poll() is None:
            kill_group(process)
    event = json.loads((out / "events.jsonl").read_text().splitlines()[-1])
    return End(printed, process.returncode, rank, told[rank].pid, took_s, left, event)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of one run that every fault below is done to, start after start."""
    return tmp_path_factory.mktemp("harmed") / "run"


def check(end: End, event: str, text: str) -> None:
    """The run ended by itself, said once who was to blame, and left no process."""
    assert end.code == 1 or (event == "rank lost" and end.code != 0)
    assert end.left == [], end.printed[-3000:]
    told = [line for line in end.printed.splitlines() if line.startswith("unic_ds: error: ")]
    assert len(told) == 1, end.printed[-3000:]
    assert f"error: rank {end.rank} (" in told[0]
    assert f", pid {end.pid})" in told[0]
    assert text in told[0]
    assert end.event["event"] == event
    assert end.event["ranks"][0]["rank"] == end.rank


pytestmark = [DEMONSTRATION, pytest.mark.slow, pytest.mark.alone, pytest.mark.dist]


@pytest.mark.fault("a rank sleeps in a teacher", "ends, naming it and its phase")
def test_a_rank_without_progress_is_named_with_its_phase(out):
    command = launched(out, **RUN, run__stall_timeout=12)
    end = end_of(out, command, SLEEPY="1:6")  # three calls find out its width and FLOPs
    check(end, "no progress", "in phase 'teachers' of step 3 (at ")
    assert "the other ranks wait for it: 1 in phase " in end.printed
    assert end.event["ranks"][0]["phase"] == "teachers"
    assert (out / "heartbeats" / "stacks_00001.txt").read_text().count("sleepy_teacher.py")


@pytest.mark.fault("all ranks hang at the same point", "ends, blaming none")
def test_if_all_ranks_hang_none_is_blamed(out):
    end = end_of(out, launched(out, **RUN, run__stall_timeout=12), SLEEPY="all:6")
    assert end.code == 1 and end.left == [], end.printed[-3000:]
    assert "none of the 2 ranks made progress for " in end.printed
    assert end.event["event"] == "no progress"
    assert "in phase 'teachers' of step " in end.event["says"]


@pytest.mark.parametrize(("rank", "starts"), [(1, launched), (0, with_torchrun)])
@pytest.mark.fault("SIGSTOP to a rank", "ends within hang_timeout, naming it")
def test_a_stopped_rank_is_named_and_ended(out, rank, starts):
    command = starts(out, **RUN, run__hang_timeout=SILENT_S)
    end = end_of(out, command, signal.SIGSTOP, rank)
    check(end, "rank silent", f"wrote no heartbeat for {SILENT_S} s")
    assert end.took_s < SILENT_S + 25  # most of it the launcher's on a busy machine; gloo: 1800 s


@pytest.mark.fault("SIGKILL to a rank", "ends at once, naming it")
def test_a_killed_rank_is_named(out):
    end = end_of(out, launched(out, **RUN), signal.SIGKILL, 1)
    check(end, "rank lost", "was killed in phase ")
    assert end.took_s < 25


@pytest.mark.fault("one run harmed so start after start", "goes on to the unharmed curve")
def test_the_same_command_then_gives_the_unharmed_curve(out, tmp_path, monkeypatch):
    """Of the run that the tests above have harmed."""
    monkeypatch.setenv("PYTHONPATH", AWAKE["PYTHONPATH"])
    assert "resumed after step" in run(launched(out, **RUN))
    assert not (out / "heartbeats").exists()
    run(launched(tmp_path / "whole", **RUN))
    assert curve(out) == curve(tmp_path / "whole")
    assert len(curve(out)) == int(RUN["optim__steps"])
