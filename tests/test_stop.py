"""A run that is asked to stop saves, ends well, and goes on to the same curve."""

import os
import signal
import time
from pathlib import Path

import pytest
from runs import DEMONSTRATION, curve, launched, reached, run, start, two

from unic_ds import dist

pytestmark = DEMONSTRATION

MORE = {"optim__steps": "24", "run__save_every": "100", "eval__on": "false"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(two(out, **MORE))
    return out


def ranks_of(out: Path) -> list[int]:
    """Process ids of the ranks that train in `out`, without their launcher."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = any(word.startswith(b"--local_rank") for word in words)
        if is_rank and str(out).encode() in words and b"deepspeed.launcher.launch" not in words:
            found.append(int(folder.name))
    return found


def stopped_by(ask, out: Path) -> str:
    """What a run printed that `ask` stopped after two steps."""
    before, process = reached(out), start(launched(out, **MORE))
    while reached(out) < before + 2:
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    ask()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed[-3000:]
    return printed


@pytest.mark.dist
@pytest.mark.slow
def test_a_stop_file_or_a_signal_to_one_rank_saves_and_ends_the_run(whole, tmp_path):
    out = tmp_path / "run"
    printed = stopped_by((out / "STOP").touch, out)
    assert "of 24; the same command goes on from there" in printed
    assert not (out / "STOP").exists()
    step = max(curve(out))
    assert (out / "checkpoints" / "latest").read_text() == f"step_{step:07d}"
    assert step < 24

    printed = stopped_by(lambda: os.kill(max(ranks_of(out)), signal.SIGUSR1), out)
    assert f"resumed after step {step}" in printed
    run(launched(out, **MORE))
    assert curve(out) == curve(whole)


def test_a_signal_that_comes_again_is_one_request(tmp_path):
    """Slurm tells the ranks and torchrun, which tells them again while they save."""
    before = {number: signal.getsignal(number) for number in dist.StopRequest.SIGNALS}
    try:
        request = dist.StopRequest(tmp_path / "STOP")
        assert not request.agreed() and not request.agreed()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert [request.agreed(), request.agreed()] == [False, True]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
