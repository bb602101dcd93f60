"""The lock of a run's folder."""

import threading
import time

import pytest
from runs import alone, run

from unic_ds.training import run_dir


@pytest.fixture
def held(tmp_path):
    """A lock that another has, and a second handle of it."""
    with (tmp_path / ".lock").open("a") as theirs, (tmp_path / ".lock").open("a") as ours:
        assert run_dir.acquire_lock(theirs, 0.0)
        yield theirs, ours


def test_a_lock_is_waited_for_as_long_as_a_lost_node_may_keep_it(held):
    theirs, ours = held
    assert not run_dir.acquire_lock(ours, 0.0)
    begun = time.monotonic()
    assert not run_dir.acquire_lock(ours, 0.5)
    assert time.monotonic() - begun >= 0.5
    threading.Timer(0.5, theirs.close).start()
    assert run_dir.acquire_lock(ours, 60.0)


def test_a_second_job_in_a_folder_is_refused(stopped, tmp_path):
    with (stopped / ".lock").open("a") as theirs:
        assert run_dir.acquire_lock(theirs, 0.0)
        said = run(alone(stopped, optim__steps=6, eval__on="false"), code=2)
    assert f"another job trains in {str(stopped)!r}; end it, or choose another --out" in said
