"""A run that is asked to stop, or saves by the clock, goes on to the same curve."""

import os
import signal
import time
from pathlib import Path

import pytest
from runs import DEMONSTRATION, curve, kill_on_the_way, launched, reached, run, saved, start, two

from unic_ds import dist

MORE = {"optim__steps": "24", "run__save_every": "100", "eval__on": "false"}


@pytest.fixture(scope="module")
def whole(demonstration, tmp_path_factory):
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
    """Output of a run that `ask` stopped after two steps."""
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


@DEMONSTRATION
@pytest.mark.dist
@pytest.mark.soak
def test_saves_by_the_clock_do_not_move_the_curve(tmp_path):
    """Two ranks: they save together, at log lines, and no line is another for it."""
    more = MORE | {"optim__steps": 20, "run__save_every": 0, "run__log_every": 3}
    unhurried, hurried = tmp_path / "unhurried", tmp_path / "hurried"
    assert run(two(unhurried, **more)).count("saved step_") == 1
    more |= {"run__save_minutes": 0.01}  # some steps: which ones is the machine's affair
    kill_on_the_way(two(hurried, **more), hurried, 17)
    assert saved(hurried) % 3 == 0
    printed = run(two(hurried, **more))
    assert "resumed after step" in printed and "saved step_" in printed
    assert curve(hurried) == curve(unhurried)


@pytest.fixture
def handlers():
    """Signals are handled as before once the test is over."""
    before = {number: signal.getsignal(number) for number in dist.StepVotes.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_comes_again_is_one_request(handlers, tmp_path):
    """Slurm tells the ranks and torchrun, which tells them again while they save."""
    votes = dist.StepVotes(tmp_path / "STOP")
    assert not votes.agreed().stop and not votes.agreed().stop
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert [votes.agreed(), votes.agreed()] == [(False, False), (True, False)]


def test_the_clock_asks_for_a_save_until_there_is_one(handlers):
    never, votes = dist.StepVotes(), dist.StepVotes(save_s=0.2)
    assert not votes.agreed().save
    time.sleep(0.2)
    assert [votes.agreed().save for _ in range(3)] == [False, True, True]
    votes.saved()
    assert [votes.agreed().save for _ in range(2)] == [False, False]
    time.sleep(0.2)
    assert [votes.agreed().save for _ in range(2)] == [False, True]
    assert not any(never.agreed().save for _ in range(3))
