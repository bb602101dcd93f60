"""Comparison of models: best, gains, ranks; its table, files and picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unic_ds.evaluate import comparison, table
from unic_ds.evaluate.comparison import Comparison, Role, Row, Score

ROLES: dict[str, Role] = {
    "pixels": "baseline",
    "dino": "teacher",
    "clip": "teacher",
    "student": "student",
}
SCORES = [
    Score("pixels", "knn", 70.0, "knn k=10 112 px"),
    Score("dino", "knn", 80.0, "knn k=10 98 px"),
    Score("clip", "knn", 75.0, "knn k=10 112 px"),
    Score("student", "knn", 82.0, "knn k=10 112 px"),
    Score("dino", "depth RMSE", 0.5, "depth", unit="m", better="lower"),
    Score("clip", "depth RMSE", 0.4, "depth", unit="m", better="lower"),
    Score("student", "depth RMSE", 0.44, "depth", unit="m", better="lower"),
    Score("student", "zeroshot clip", 60.0, "zeroshot"),
    Score("clip", "zeroshot clip", 64.0, "zeroshot"),
    Score("student", "rankme", 123.4, "rankme", unit="", better=""),
]
ROWS_WITH_NAN = (("dino", "clip", "more", "student"), ("student", "more", "clip", "dino"))
FOUND = Comparison.of(SCORES, ROLES)


def test_gains_are_of_the_best_teacher_in_each_row() -> None:
    rows = {row.name: row for row in FOUND.rows}
    assert rows["knn"].best() == ["student"]
    assert rows["knn"].gain("student", ROLES) == pytest.approx(2)
    assert rows["knn"].relative_gain("student", ROLES) == pytest.approx(2.5)
    assert rows["depth RMSE"].best() == ["clip"]
    assert rows["depth RMSE"].gain("student", ROLES) == pytest.approx(-0.04)
    assert rows["depth RMSE"].relative_gain("student", ROLES) == pytest.approx(-10)
    assert rows["zeroshot clip"].relative_gain("student", ROLES) == pytest.approx(-6.25)
    assert rows["rankme"].best() == [] and rows["rankme"].gain("student", ROLES) is None
    assert rows["knn"].gain("absent", ROLES) is None


def test_average_ranks_are_over_the_rows_that_all_share() -> None:
    ranks, count = FOUND.average_ranks()
    assert count == 2  # kNN and depth; dino has no zero-shot accuracy
    assert ranks == {"dino": 2.5, "clip": 2.0, "student": 1.5}
    equal = Comparison.of([Score("a", "x", 1.0, ""), Score("b", "x", 1.0, "")], {"a": "teacher"})
    assert equal.average_ranks() == ({}, 0)  # one model cannot be ranked
    tied = Comparison.of([Score(name, "x", 1.0, "") for name in ("dino", "clip", "student")], ROLES)
    assert tied.average_ranks() == ({"dino": 2.0, "clip": 2.0, "student": 2.0}, 1)


@pytest.mark.parametrize("order", ROWS_WITH_NAN)
def test_values_that_are_not_finite_count_nowhere(order: tuple[str, ...], tmp_path: Path) -> None:
    value = {"dino": math.nan, "clip": 75.0, "more": math.inf, "student": 82.0}
    roles = ROLES | {"more": "teacher"}
    scores = [Score(name, "linear", value[name], "") for name in order]
    scores += [Score(name, "knn", rank, "") for rank, name in enumerate(order)]
    scores += [Score("student", "cka", math.nan, ""), Score("clip", "cka", 0.5, "")]
    found = Comparison.of(scores, roles)
    linear, knn, cka = found.rows
    assert linear.gain("student", roles) == 7 and linear.best() == ["student"]
    assert linear.relative_gain("student", roles) == pytest.approx(100 * 7 / 75)
    assert cka.gain("student", roles) is cka.relative_gain("student", roles) is None
    ranks, count = found.average_ranks()
    assert count == 1 and ranks == {name: 4.0 - knn.values[name] for name in order}
    json.dumps([found.plain(), found.by_model()], allow_nan=False)
    found.write(tmp_path)
    again = table.render(comparison.read(tmp_path))  # JSON has no infinity
    assert again == table.render(found).replace("inf", "nan")
    (tmp_path / "evaluation.json").unlink()
    assert comparison.read(tmp_path).by_model() == found.by_model()
    assert found.by_model()["dino"] == {"linear": None, "knn": knn.values["dino"]}


def test_the_table_has_every_number() -> None:
    text = table.render(FOUND)
    assert "\x1b" not in text
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in text.splitlines()
        if line.startswith("│")
    }
    assert cells["kNN %"] == ["70.0", "80.0", "75.0", "82.0", "+2.0 (+2.5 %)"]
    assert cells["depth RMSE m"] == ["-", "0.500", "0.400", "0.440", "-0.040 (-10.0 %)"]
    assert cells["zeroshot clip %"] == ["-", "-", "64.0", "60.0", "-4.0 (-6.2 %)"]
    assert cells["rankme"] == ["-", "-", "-", "123.4", "-"]
    assert "average rank over 2 rows (1 is best): dino 2.5, clip 2.0, student 1.5" in text
    assert text.splitlines()[-5:] == [
        "knn k=10 112 px: pixels, clip, student",
        "knn k=10 98 px: dino",
        "depth",
        "zeroshot",
        "rankme",
    ]


def test_a_task_s_name_stays_as_it_is_given_on_the_command_line() -> None:
    labels = [table.label(Row(name, "%", "higher")) for name in ("knn k=5", "transfer_knn pets")]
    assert labels == ["kNN k=5 %", "transfer_knn pets %"]


def test_names_from_outside_are_printed_plainly() -> None:
    name = "[red]x[/red]\x1b[2J"
    text = table.render(Comparison.of([Score(name, "knn", 1.0, "p\x1b")], {name: "student"}))
    assert "[red]" in text and "\x1b" not in text


def test_a_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    broken = Comparison.of(
        [*SCORES, Score("dino", "rankme", float("nan"), "rankme", "", "")], ROLES
    )
    broken.write(tmp_path)
    plain = json.loads((tmp_path / "evaluation.json").read_text())
    assert plain["rows"][0]["student_minus_best_teacher"] == {"student": 2.0}
    assert plain["rows"][3]["values"] == {"student": 123.4, "dino": None}
    found = comparison.read(tmp_path)
    assert found.roles == ROLES and found.rows[:3] == FOUND.rows[:3]
    assert table.render(found) == table.render(broken)
    by_model = json.loads((tmp_path / "results.json").read_text())
    assert by_model["student"] == {
        "knn": 82.0,
        "depth RMSE": 0.44,
        "zeroshot clip": 60.0,
        "rankme": 123.4,
    }


def test_results_of_older_versions_are_read(tmp_path: Path) -> None:
    old = {"pixels": {"knn": 70.0}, "dino": {"knn": 80.0}, "student after": {"knn": 75.0}}
    (tmp_path / "results.json").write_text(json.dumps(old))
    found = comparison.read(tmp_path)
    assert found.by_model() == old
    assert found.named("student") == ["student after"] and found.named("teacher") == ["dino"]
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no result of an evaluation"):
        comparison.read(tmp_path)


def test_the_picture_has_the_curve_and_the_bars(tmp_path: Path) -> None:
    log = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.5}, {"note": "saved"}]
    with Image.open(table.plot(FOUND, log, tmp_path / "results.png")) as image:
        pixel = np.asarray(image.convert("RGB")).astype(int)
    assert pixel.shape[0] > 300 and pixel.shape[1] > 1000
    half = pixel.shape[1] * 2 // 5
    blue, orange = (31, 119, 180), (255, 127, 14)  # the first colours of matplotlib
    for part, colours in ((pixel[:, :half], [blue]), (pixel[:, half:], [blue, orange])):
        for colour in colours:
            assert (np.abs(part - colour).sum(-1) < 12).sum() > 100


def test_a_run_without_evaluation_has_a_picture_too(tmp_path: Path) -> None:
    empty = Comparison({}, [])
    empty.write(tmp_path)
    assert comparison.read(tmp_path).rows == []
    with Image.open(table.plot(empty, [], tmp_path / "results.png")) as image:
        upright = (np.asarray(image.convert("L")) < 128).mean(0) > 0.5
    assert (np.diff(upright.astype(int)) == 1).sum() == 2  # the frame of the curve's axes alone
