"""Statistics by hand, the table of one seed, the page of hostile texts, and the array of jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from unic_ds.ablation import ablate, ablation_page, child, grid, job_array, plot, tables
from unic_ds.ablation.cells import Study
from unic_ds.ablation.results import Results, Unfinished, measures_of, spread
from unic_ds.evaluate.comparison import Comparison, Role, Score

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "</script><img src=x onerror=alert(1)>[bold]\x1b[2J|"
ROLES: dict[str, Role] = {"a": "student", "b": "student", "effnet": "teacher", "dinov2": "teacher"}


def study(tmp_path: Path, seeds: str = "0,1,2") -> Study:
    """Two cells of the quickstart."""
    plain = {"cells": {"a": {}, "b": {"optim.lr": "0.1"}}, "seeds": seeds}
    return Study(grid=grid.parse(plain, name="x", settings={}), out=tmp_path / "out")


def table(accuracy: dict[str, float], error: dict[str, float]) -> Comparison:
    """An evaluation by two measures."""
    scores = [Score(model, "knn", value, "knn k=10") for model, value in accuracy.items()]
    scores += [Score(m, "depth", value, "rmse", "m", "lower") for m, value in error.items()]
    return Comparison.of(scores, ROLES)


def results(tmp_path: Path) -> Results:
    """Three seeds, of which cell b lacks one; a value of it is not finite."""
    return Results(
        study(tmp_path),
        measures_of(
            {
                0: table({"a": 70, "b": 74, "effnet": 80, "dinov2": 60}, {"a": 1.0, "b": 0.5}),
                1: table({"a": 72, "b": 80, "effnet": 80, "dinov2": 84}, {"a": 2.0, "b": 1.0}),
                2: table({"a": 77, "effnet": 81, "dinov2": 79}, {"a": 3.0, "b": float("nan")}),
            }
        ),
        [Unfinished("b", 2, "the disk is full", "out/b/seed2/train.log")],
    )


def test_statistics_are_those_by_hand(tmp_path: Path) -> None:
    found = results(tmp_path).plain()
    knn, depth = found["measures"]
    a, b = knn["cells"]["a"], knn["cells"]["b"]
    assert (a["mean"], a["seeds"]) == (73, 3)
    assert a["std"] == pytest.approx(13**0.5)  # (9 + 1 + 16) / 2
    assert (b["mean"], b["seeds"], b["std"]) == (77, 2, pytest.approx(18**0.5))
    assert b["minus_compared"] == {"mean": 6, "std": pytest.approx(8**0.5), "seeds": 2}
    # The best teachers are those of each seed: 80, 84, 81.
    assert a["minus_best_teacher"]["mean"] == pytest.approx(-26 / 3)
    assert knn["best_teacher"] == pytest.approx(245 / 3)
    assert knn["teachers"]["dinov2"]["values"] == {"0": 60, "1": 84, "2": 79}
    assert depth["cells"]["b"]["values"] == {"0": 0.5, "1": 1.0, "2": None}
    assert depth["cells"]["b"]["mean"] == 0.75
    assert depth["cells"]["b"]["minus_compared"]["mean"] == 0.75  # less is better
    assert depth["best_teacher"] is None and depth["cells"]["a"]["minus_best_teacher"] is None
    # Cell b lacks a value of seed 2 by both measures: means over other seeds are not ranked.
    assert found["cells"]["b"]["average_rank"] is None and found["measures_of_average_rank"] == 0
    json.dumps(found, allow_nan=False)
    assert spread({0: float("nan")}) is None and spread({}) is None


def test_cells_are_ranked_over_the_same_seeds(tmp_path: Path) -> None:
    plain = {"cells": {c: {"optim.lr": str(i + 1)} for i, c in enumerate("abc")}, "seeds": "0,1"}
    given = Study(grid=grid.parse(plain, name="x", settings={}), out=tmp_path / "out")
    roles: dict[str, Role] = dict.fromkeys("abc", "student")
    values = {0: {"a": 1.0, "b": 2.0, "c": 9.0}, 1: {"a": 5.0, "b": 3.0}}
    tables_of = {
        seed: Comparison.of(
            [Score(m, task, x, task) for m, x in row.items() for task in ("knn", "linear")], roles
        )
        for seed, row in values.items()
    }
    found = Results(given, measures_of(tables_of), [], [7])
    # a: (1 + 5) / 2 = 3, b: (2 + 3) / 2 = 2.5; c has the highest mean, of one seed.
    assert found.measures[0].best(found.cells) == ["a"]
    assert found.ranks() == ({"a": 1.0, "b": 2.0}, 2)
    text = shown(found)
    assert "neither best nor ranked by such a measure: c" in text
    assert "seed 7: not evaluated, or with other students" in text


def test_cells_beyond_a_picture_are_counted(tmp_path: Path) -> None:
    cells = {f"c{i}": {"optim.lr": str(i + 1)} for i in range(plot.CELLS + 1)}
    given = Study(grid=grid.parse({"cells": cells}, name="x", settings={}), out=tmp_path / "out")
    scores = [Score(cell, "knn", float(i), "knn") for i, cell in enumerate(cells)]
    table = Comparison.of(scores, dict.fromkeys(cells, "student"))
    found = Results(given, measures_of({0: table}), [])
    page = ablation_page.render(found, plot.draw(found))
    assert "the first 60 of 61 cells; the table has all" in page
    assert "The first 60 of 61 cells; the table of the results has all." in page
    assert "The first 0 of 61 cells" in page  # no run has a log


def test_numbers_are_written_if_the_picture_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(tmp_path)
    (found.study.out / plot.FILE / "x").mkdir(parents=True)
    assert not ablate.write_results(found)
    assert "ablation.png cannot be made: IsADirectoryError" in capsys.readouterr().out
    assert json.loads((found.study.out / "ablation.json").read_text()) == found.plain()
    assert (found.study.out / "ablation.md").read_text() == tables.as_markdown(found)


def shown(found: Results) -> str:
    """The table on a terminal of 140 columns."""
    console = Console(width=140, color_system=None, force_terminal=False)
    with console.capture() as capture:
        tables.show(found, console)
    return capture.get()


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    one = measures_of({0: table({"a": 70, "b": 74, "effnet": 80}, {})})
    found = Results(study(tmp_path, "0"), one, [])
    text = shown(found)
    assert "+-" not in text and "74.0" in text and "+4.0" in text and "-6.0" in text
    assert "+-" not in tables.as_markdown(found)
    assert found.plain()["measures"][0]["cells"]["b"]["std"] is None
    several = shown(results(tmp_path))
    assert "77.0 +- 4.2" in several and "+6.0 +- 2.8" in several
    assert "b, seed 2: the disk is full (out/b/seed2/train.log)" in several


def test_texts_from_outside_stay_texts(tmp_path: Path) -> None:
    scores = [Score(model, SCRIPT, 70.0 + i, SCRIPT, "%") for i, model in enumerate(ROLES)]
    measures = measures_of({0: Comparison.of(scores, ROLES)})
    found = Results(study(tmp_path), measures, [Unfinished("b", 0, SCRIPT, SCRIPT)])
    page = ablation_page.render(found, plot.draw(found))
    assert page.count("<img") == 1 and "onerror=alert(1)&gt;" in page and "\x1b" not in page
    assert page.count("<script") == 2 and "default-src 'none'" in page
    assert "\x1b" not in shown(found) and "[bold]" in shown(found)
    text = tables.as_markdown(found)
    assert "<img" not in text and "\\|" in text and "\x1b" not in text


def test_a_task_of_the_array_gets_the_words_of_the_command(tmp_path: Path) -> None:
    """`unic-ds` is a program that prints its words; all else is real."""
    name = "x $(touch ran) 'y\" \\ ; &"
    out = tmp_path / name
    found = grid.read(["drop.rate=0,0.5"], {"data.train": name})
    job_array.write(Study(grid=found, out=out, ranks=2, views=0))
    script = out / job_array.FILE
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "#SBATCH --nodes=1" in script.read_text() and "--array=0-5\n" in script.read_text()
    (tmp_path / "slurm").mkdir()
    shutil.copy(ROOT / "slurm" / "env.sh", tmp_path / "slurm" / "env.sh")
    (tmp_path / "unic-ds").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "unic-ds").chmod(0o755)
    done = subprocess.run(
        ["bash", str(script)],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "4"}
        | {"UNIC_DS_NPROC": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    (copy,) = out.glob("drop.rate-*.yaml")
    words = ["ablate", str(copy), "--out", str(out), "--ds_config", "ds_configs/zero2.json"]
    words += ["--views", "0", "--ranks", "2", "--only", "4"]
    assert done.stdout.splitlines() == words
    assert grid.read([str(copy)], {}).settings == {"data.train": name}
    assert not (tmp_path / "ran").exists()


def test_an_array_has_no_order_for_teachers(tmp_path: Path) -> None:
    late = Study(grid=grid.read(["levers"], {}), out=tmp_path)
    with pytest.raises(ValueError, match="from-big, big-and-teachers is a run of this grid"):
        job_array.write(late)


def test_the_error_of_the_latest_start_is_named(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    assert child.last_error(log) == ""
    log.write_text(f"{child.STARTED}train\n{child.ERROR}old\nlauncher ends\n")
    assert child.last_error(log) == "old"
    log.write_text(log.read_text() + f"{child.STARTED}train\nKeyError: \x1b[2J\n\n")
    assert child.last_error(log) == "KeyError: \\x1b[2J"


def test_a_third_signal_kills_ranks_in_sessions_of_their_own(tmp_path: Path) -> None:
    """As torchrun's: the leader ignores the signal, and its child is in another group."""
    script = "trap '' INT; setsid sleep 300 & echo $!; wait; wait; wait"
    leader = subprocess.Popen(
        ["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdout
    rank = psutil.Process(int(leader.stdout.readline()))
    signals = child.Signals()
    signals.send_to(leader.pid)
    for _ in range(child.PATIENCE - 1):
        signals.forward(signal.SIGINT, None)
    assert rank.is_running() and leader.poll() is None
    signals.forward(signal.SIGINT, None)
    assert leader.wait(30) == -signal.SIGKILL
    rank.wait(30)


def test_ranks_are_started_by_torchrun() -> None:
    words = child.command(["train", "--out", "x"], 2)
    assert words[1:3] == ["-m", "torch.distributed.run"] and "--standalone" in words
    assert words[-3:] == [str(child.TRAIN), "--out", "x"] and child.TRAIN.is_file()
