"""`unic-ds watch`: frames for any size of terminal, and a real terminal in which a run grows."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import sys
import termios
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console
from runs import environment, run, verb

from unic_ds import cli
from unic_ds.config import overrides, recipes
from unic_ds.report import sparkline, watch_loop
from unic_ds.report.run_record import Event, RunRecord, Series, read
from unic_ds.report.watch_view import frame

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
WAIT_S = 120
BEGIN, END = "\x1b[?1049h", "\x1b[?1049l"
"""A terminal's other screen is entered and left."""


def lines_of(record: RunRecord, **given) -> list[str]:
    """The lines of a frame, as a console prints them."""
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=given.get("width", 80), record=True, file=nowhere)
        console.print(frame(record, **{"now": NOW} | given))
    return console.export_text().splitlines()


def made(teachers: int = 2, events: int = 20) -> RunRecord:
    """A record of a run with many teachers and much to say."""
    step_N, quickstart = np.arange(1, 401) * 10, recipes.get("quickstart")
    rows = [replace(quickstart.teachers[0], name=f"t{n}") for n in range(teachers)]
    ramp_N = step_N / 4000
    values = {"loss": 1 - ramp_N, "images_per_s": 0 * ramp_N + 640, "samples": step_N * 64.0}
    values |= {"data_wait_share": 0.5 + 0 * ramp_N, "lr": 1e-4 + 0 * ramp_N, "mem_gb": ramp_N}
    for n in range(teachers):
        values |= {f"t{n}/{name}": ramp_N for name in ("kept", "weight", "cls_cosine")}
    return RunRecord(
        folder=Path("runs/\x1b[31mred\n"),
        name="red",
        settings=replace(quickstart, teachers=tuple(rows)),
        series={name: Series(step_N, value_N) for name, value_N in values.items()},
        events=[Event(NOW, "skipped", n, {"why": "loss\x1b]0;title"}) for n in range(events)]
        + [Event(NOW, "unreadable", 20, {"images": [{"name": "a.jpg", "reason": "truncated"}]})],
        teachers={},
        comparison=None,
        steps=10_000,
        finished=False,
        written=NOW - timedelta(seconds=12),
    )


def test_sparklines():
    assert sparkline.sparkline(np.arange(8.0), 20) == "▁▂▃▄▅▆▇█"
    assert sparkline.sparkline(np.arange(16.0), 8, blocks=False) == "_.,-=+*#"
    assert sparkline.sparkline(np.array([1, np.nan, np.inf, 2.0]), 4) == "▁  █"
    assert sparkline.sparkline(np.array([3.0, 3.0]), 4) == "▅▅"
    assert sparkline.sparkline(np.array([np.nan]), 4) == " "
    assert sparkline.sparkline(np.array([-1e308, 1e308]), 2) == "▁█"
    assert sparkline.sparkline(np.array([]), 4) == sparkline.sparkline(np.ones(3), 0) == ""
    assert (sparkline.bar(0.25, 8), sparkline.bar(7.0, 2)) == ("██░░░░░░", "██")


def test_a_frame_has_all_that_one_looks_for():
    text = "\n".join(lines_of(made()))
    for part in (
        "logged 12 s ago",
        "40%  step 4,000 of 10,000  ETA 10 min",
        "640 img/s",
        "data wait 50%",
        "▁▂▃▄▅▆▇█"[-1],
        "t1 ",
        "! 50% of the time is spent waiting for images",
        "try: more `--data.threads`",
        "skipped step 19: loss\\x1b]0;title",
        "unreadable step 20: 1 image: a.jpg (truncated)",
        "runs/\\x1b[31mred\\n",
    ):
        assert part in text
    assert "\x1b" not in text


@pytest.mark.parametrize("size", [(80, 24), (80, 12), (40, 8), (200, 60), (10, 3)])
@pytest.mark.parametrize("teachers", [0, 2, 100])
def test_a_frame_fits_the_terminal(size, teachers):
    width, height = size
    lines = lines_of(made(teachers), width=width, height=height, note="q ends")
    assert len(lines) <= height and max(map(len, lines)) <= width
    if size == (80, 24):
        text = "\n".join(lines)
        assert "ETA" in text and "data wait" in text and lines[-1] == "q ends"
        assert "! 50% of the time" in text and "events" in text
        assert teachers < 100 or "more lines" in text


def test_a_terminal_without_block_characters_gets_ascii():
    text = "\n".join(lines_of(replace(made(), folder=Path("runs/é")), encoding="ascii"))
    assert text.isascii() and "_.,-=+*#"[-1] in text and "runs/\\xe9" in text


def test_states():
    record = made()
    beats = [{"rank": 0, "phase": "saving"}]
    old = replace(record, written=NOW - timedelta(hours=5))
    for state, changed in {
        "finished": replace(record, finished=True),
        "stalled": replace(old, heartbeats=beats),
        "stopped": old,
        "exporting, evaluating": replace(record, steps=4000, heartbeats=beats),
        "trained, not evaluated": replace(record, steps=4000),
        "waiting": replace(record, series={}, written=None),
    }.items():
        lines = lines_of(changed)
        assert lines[0].endswith(state) and "ETA" not in lines[1]
    assert "waiting for the first log line" in lines


def test_a_pipe_gets_one_frame_and_so_does_once(finished, capsys):
    out, _ = finished
    printed = run(verb("watch", out))
    assert "\x1b" not in printed and "finished" in printed and "step 4 of 4" in printed
    assert "dinov2" in printed and "health: no findings" in printed
    assert cli.dispatch(["watch", str(out), "--once"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == printed.splitlines()[1:]


def test_no_run_folder_is_a_mistake(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no run folder: it has no config.yaml"):
        watch_loop.run(tmp_path, once=True)
    before = sorted(tmp_path.iterdir())
    plain = overrides.to_dict(recipes.get("quickstart"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    assert watch_loop.run(tmp_path, once=True) == 0
    assert "waiting for the first log line" in capsys.readouterr().out
    assert before == [] and [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


class Terminal:
    """`unic-ds watch RUN` in a terminal of 80x24 of its own."""

    def __init__(self, folder: Path):
        words = [sys.executable, "-m", "unic_ds.cli", "watch", str(folder)]
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.execve(sys.executable, words, environment() | {"TERM": "xterm", "COLUMNS": "80"})
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.text = ""

    def read(self, seconds: float) -> bool:
        """Read what is printed within so many seconds; False at the end."""
        if select.select([self.file], [], [], seconds)[0]:
            try:
                self.text += os.read(self.file, 1 << 16).decode(errors="replace")
            except OSError:  # the process has ended
                return False
        return True

    def until(self, pattern: str) -> None:
        """Wait until a pattern is printed after what was found before."""
        end = time.monotonic() + WAIT_S
        while not (found := re.search(pattern, self.text)):
            assert self.read(1.0) and time.monotonic() < end, self.text[-3000:]
        self.text = self.text[found.end() :]

    def press(self, key: bytes) -> None:
        os.write(self.file, key)

    def code(self) -> int:
        """The exit code; `text` has the rest of the output, `left` the terminal's last settings."""
        end = time.monotonic() + WAIT_S
        while self.read(1.0):
            assert time.monotonic() < end, self.text[-3000:]
        _, status = os.waitpid(self.pid, 0)
        self.left = termios.tcgetattr(self.file)
        os.close(self.file)
        return os.waitstatus_to_exitcode(status)


def steps(folder: Path, first: int, last: int) -> None:
    """Append log lines to a run's log."""
    with (folder / "log.jsonl").open("a") as file:
        for step in range(first, last + 1):
            row = {"step": step, "samples": 16 * step, "loss": 2 / step, "images_per_s": 64.0}
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def growing(tmp_path):
    """A run folder of 400 steps that has no log yet."""
    cfg = recipes.get("quickstart")
    cfg = replace(cfg, optim=replace(cfg.optim, steps=400))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(overrides.to_dict(cfg)))
    return tmp_path


def test_a_run_grows_breaks_and_finishes_while_it_is_watched(growing):
    terminal = Terminal(growing)
    terminal.until(re.escape(BEGIN))
    terminal.until("waiting for the first log line")
    steps(growing, 1, 20)
    terminal.until(r"5%  step 20 of 400  ETA \d+ s")
    (growing / "teachers.json").write_text('{"din')
    steps(growing, 21, 30)
    terminal.until("not read just now: ")
    (growing / "teachers.json").unlink()
    terminal.until("step 30 of 400")
    steps(growing, 31, 400)
    (growing / "student").mkdir()
    for name in ("student/model.safetensors", "results.json"):
        (growing / name).write_text("{}")
    terminal.until(re.escape(END))
    terminal.until("finished")  # the last frame stays on the screen
    assert terminal.code() == 0


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_a_key_ends_it(growing, key):
    steps(growing, 1, 20)
    growing.chmod(0o555)
    terminal = Terminal(growing)
    attributes = termios.tcgetattr(terminal.file)
    terminal.until(re.escape(watch_loop.HINT))
    assert termios.tcgetattr(terminal.file) != attributes  # no waiting for the end of the line
    terminal.press(key)
    terminal.until(re.escape(END))
    assert terminal.code() == 0 and "Traceback" not in terminal.text
    assert terminal.left == attributes
    growing.chmod(0o755)
    assert sorted(p.name for p in growing.iterdir()) == ["config.yaml", "log.jsonl"]


def test_stages_are_watched_in_turn(growing):
    cfg = read(growing).settings
    staged = yaml.safe_dump(overrides.to_dict(replace(cfg, stages="optim.steps=50")))
    (growing / "config.yaml").write_text(staged)
    first = growing / "stage1"
    first.mkdir()
    shutil.copy(growing / "config.yaml", first / "config.yaml")
    steps(first, 1, 10)
    watched = watch_loop.Watched(growing)
    assert watched.record.last_step == 10 and watched.record.folder == first
    (first / "student").mkdir()
    for name in ("student/model.safetensors", "results.json"):
        (first / name).write_text("{}")
    steps(growing, 1, 3)
    for _ in range(2):
        watched.update()
    assert watched.record.last_step == 3 and not watched.finished
