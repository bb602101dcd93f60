"""Statistics by hand, the table of one seed, the page of hostile texts, and the array of jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from unic_ds.ablation import ablation_page, child, grid, job_array, plot, tables
from unic_ds.ablation.cells import Study
from unic_ds.ablation.results import Results, Unfinished, measures_of, spread
from unic_ds.cli.ablate import words_of
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
    assert found["cells"]["b"]["average_rank"] == 1 and found["measures_of_average_rank"] == 2
    json.dumps(found, allow_nan=False)
    assert spread({0: float("nan")}) is None and spread({}) is None


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
    argv = ["drop.rate=0,0.5", f"--data.train={name}", "--slurm", "true", "--ranks=2"]
    given = Study(grid=grid.read(argv[:1], {}), out=out, ranks=2)
    job_array.write(given, words_of([*argv, "--out", "z", "--seeds", "0,1"], out))
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
    words = ["ablate", "drop.rate=0,0.5", f"--data.train={name}", "--seeds", "0,1", "--out"]
    assert done.stdout.splitlines() == [*words, str(out), "--ranks", "2", "--only", "4"]
    assert not (tmp_path / "ran").exists()


def test_an_array_has_no_order_for_teachers(tmp_path: Path) -> None:
    late = Study(grid=grid.read(["levers"], {}), out=tmp_path)
    with pytest.raises(ValueError, match="from-big, big-and-teachers is a run of this grid"):
        job_array.write(late, [])


def test_the_error_of_the_latest_start_is_named(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    assert child.last_error(log) == ""
    log.write_text(f"{child.STARTED}train\n{child.ERROR}old\nlauncher ends\n")
    assert child.last_error(log) == "old"
    log.write_text(log.read_text() + f"{child.STARTED}train\nKeyError: \x1b[2J\n\n")
    assert child.last_error(log) == "KeyError: \\x1b[2J"
