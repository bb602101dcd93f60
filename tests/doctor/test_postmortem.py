"""`unic-ds doctor RUN` on folders of real runs."""

import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest

from unic_ds import cli
from unic_ds.doctor import postmortem
from unic_ds.files import run_files
from unic_ds.process import entry_point
from unic_ds.training import heartbeat

WATCHED = """
import os, signal, sys, time
from pathlib import Path
from unic_ds.config import Run
from unic_ds.training.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), Run(hang_timeout=6), start="b", rank=0, world=1) as watchdog:
    watchdog.set_phase("backward", 5)
    time.sleep(1)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("the loss is nan at step 5")
"""


@pytest.fixture
def copy(stopped, tmp_path):
    """A run that stopped after 4 of 6 steps."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_a_finished_run_needs_nothing(finished, capsys):
    out, _ = finished
    assert cli.dispatch(["doctor", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: finished. It trained 4 steps" in printed
    assert "step_0000004: intact" in printed
    assert "What to do: nothing" in printed


def test_a_stopped_run_says_where_it_goes_on_from(copy, capsys):
    (copy / "STOP").touch()
    assert cli.dispatch(["doctor", str(copy), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "stopped"
    assert "after step 4 of 6" in found["says"]
    assert "resumes from step_0000004" in found["do"]
    assert any("STOP exists" in line for line in found["notes"])


def test_a_damaged_checkpoint_is_named_by_size_or_by_hash(copy):
    shard = next((copy / "checkpoints" / "step_0000004" / "zero").glob("*optim_states.pt"))
    with shard.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert not any(postmortem.examine(copy, hashes=False).checkpoints.values())
    found = postmortem.examine(copy, hashes=True)
    assert "is damaged" in found.checkpoints["step_0000004"]
    assert "resumes from step_0000002" in found.do
    with shard.open("r+b") as file:
        file.truncate(1000)
    found = postmortem.examine(copy, hashes=False)
    assert f"{shard.name} has 1000 bytes" in found.checkpoints["step_0000004"]
    assert found.good
    shutil.rmtree(copy / "checkpoints" / "step_0000002")
    assert not postmortem.examine(copy, hashes=False).good


def test_a_run_that_goes_on_is_left_alone(copy):
    with (copy / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert postmortem.examine(copy, hashes=False).state == "running"
    assert postmortem.examine(copy, hashes=False).state == "stopped"


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("killed", "was last in phase 'backward' of step 5 (killed from outside"),
        ("failed", "RuntimeError: the loss is nan at step 5"),
    ],
)
def test_a_run_that_ended_badly_says_how(copy, end, says):
    subprocess.run([sys.executable, "-c", WATCHED, str(copy), end], capture_output=True)
    found = postmortem.examine(copy, hashes=False)
    assert (found.state, found.good) == (end, False)
    assert says in found.says
    assert "resumes from step_0000004" in found.do


ESCAPES = "a\n\x1b[2J"
HEARTBEAT = {"start": "b", "rank": 0, "host": ESCAPES, "realm": "", "pid": 1, "born": "1"}
HEARTBEAT |= {"time": 1.0}
MANIFEST = "checkpoints/step_0000002/manifest.json"
ODD = [
    ("log.jsonl", b'[1]\n{"step": "x"}\n{"step": NaN}\n', "log.jsonl has no line with a step"),
    ("log.jsonl", b"\xff\x00" * 5000, "log.jsonl has no line with a step"),
    ("log.jsonl", b"[" * 100_000 + b"\n", "log.jsonl has no line with a step"),
    ("log.jsonl", b'{"step": 7}\n{"ste', "after step 7"),
    ("log.jsonl", None, "log.jsonl has no line with a step"),
    ("events.jsonl", b'3\n{}\n{"event": ["a"]}\n\xff\n', "4 lines of events.jsonl are no events"),
    ("events.jsonl", b'{"ev\n{"event": "skipped", "why": "loss"}\n', "1 steps were skipped (loss)"),
    ("events.jsonl", b'{"event": "skipped", "why": ["\\n\\u001b"]}\n', "(['\\n\\x1b'])"),
    ("events.jsonl", b'{"event": "rolled back"}\n', "last to step None"),
    ("events.jsonl", None, "events.jsonl is no file and was not read"),
    ("heartbeats/rank_00000.json", b"[1]", "1 files of heartbeats/ hold no heartbeat"),
    ("heartbeats/rank_00000.json", None, "1 files of heartbeats/ hold no heartbeat"),
    *(
        ("heartbeats/rank_00000.json", json.dumps(HEARTBEAT | odd).encode(), "hold no heartbeat")
        for odd in ({"rank": "x"}, {"time": float("nan")}, {"start": "../../x"}, {"more": 1})
    ),
    (
        "heartbeats/rank_00000.json",
        json.dumps(HEARTBEAT | {"error": f"{ESCAPES}unic_ds: error: all is well"}).encode(),
        "rank 0 (a\\n\\x1b[2J, pid 1) failed in phase '' of step 2: a\\n\\x1b[2Junic_ds: error",
    ),
    (MANIFEST, b"[1]", "step_0000002: no readable manifest.json"),
    (MANIFEST, b'{"a": {"bytes": "x"}}', "step_0000002: no readable manifest.json"),
    (MANIFEST, b'{"../../log.jsonl": {"bytes": 12}}', "step_0000002: no readable manifest.json"),
    (MANIFEST, b'{"a\\n\\u0000": {"bytes": 3}}', "step_0000002: a\\n\\x00 is missing"),
    (MANIFEST, None, "step_0000002: no readable manifest.json"),
    (".lock", None, "after step 2"),
    ("config.yaml", b"[", "cannot be read as a run's settings"),
    ("config.yaml", None, "is no run folder"),
]


def test_a_heartbeat_keeps_the_keys_of_older_runs(tmp_path):
    (tmp_path / run_files.HEARTBEATS).mkdir()
    heartbeat.write(tmp_path, heartbeat.create("b", 3))
    row = json.loads(heartbeat.file_of(tmp_path, 3).read_text())
    keys = "start rank host realm pid born beat step phase moves idle_s where error time"
    assert list(row) == keys.split()
    (found,) = heartbeat.read_all(tmp_path)
    assert (found.start_ticks, found.pid_namespace) == (row["born"], row["realm"])
    assert not heartbeat.has_exited(found)


@pytest.mark.parametrize(("name", "content", "says"), ODD, ids=range(len(ODD)))
def test_whatever_a_run_folder_holds_is_read(name, content, says, tmp_path, capsys):
    """Files of anybody's making; None stands for a pipe that nobody writes to."""
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "checkpoints" / "step_0000002").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("{}\n")
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n')
    (tmp_path / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    assert entry_point.run(cli.dispatch, ["doctor", str(tmp_path)]) in (0, 1, 2)
    printed = capsys.readouterr()
    assert says in printed.out + printed.err
    assert all(line.isprintable() for line in (printed.out + printed.err).splitlines())


def test_large_files_are_read_by_their_end_or_not_at_all(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("{}\n")
    for name in ("log.jsonl", "events.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 36)
            file.seek(0, os.SEEK_END)
            file.write(b'\n{"step": 9}\n')
    cli.dispatch(["doctor", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "after step 9" in printed and "events.jsonl has 68719 MB and was not read" in printed


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        cli.dispatch(["doctor", str(tmp_path)])
    with pytest.raises(ValueError, match="cannot be read"):
        cli.dispatch(["doctor", "x" * 300])
    with pytest.raises(ValueError, match="'two' belongs to no option"):
        cli.dispatch(["doctor", "one", "two"])
    with pytest.raises(ValueError, match="unknown option --hush"):
        cli.dispatch(["doctor", str(tmp_path), "--hush"])
