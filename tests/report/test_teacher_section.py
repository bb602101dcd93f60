"""The comparison of teachers on a run's page: shown, escaped, and never the end of the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from run_folders import run_folder

from unic_ds.files import run_files
from unic_ds.report import page, run_record

SCRIPT = "</table><script>alert(1)</script>"
FIGURES = {"width": 8, "rankme": 3.25, "participation": 2.5, "components": 3}
FOUND = {
    "images": 40,
    "teachers": {
        SCRIPT: {"gflops": 1.5, "parameters": 2_500_000, "tokens": {"cls": FIGURES}},
        "b": {"gflops": 30.0, "parameters": 10**9, "tokens": {"cls": FIGURES | {"rankme": None}}},
    },
    "pairs": [
        {"first": SCRIPT, "second": "b", "kind": "cls", "cka": 0.4321, "mutual_knn": 0.125}
        | {"r2_of_first": 0.5, "r2_of_second": -0.01}
    ],
    "selection": {
        "budget": 30.5,
        "steps": [{"teacher": "b", "coverage": 0.875, "cost": 30.0}],
        "left_out": {SCRIPT: "costs 1.5 GFLOPs an image, but 0 of 30 are left"},
    },
}


def page_of(tmp_path: Path, found: object) -> str:
    run = run_folder(tmp_path / "run")
    (run / run_files.COMPARISON).write_text(found if isinstance(found, str) else json.dumps(found))
    Image.new("RGB", (900, 300), "teal").save(run / run_files.COMPARISON_PICTURE)
    return page.render([run_record.read(run)])


def test_a_comparison_is_shown_and_escaped(tmp_path: Path) -> None:
    text = page_of(tmp_path, FOUND)
    section = text[text.index("Comparison of teachers") : text.index('<section id="events"')]
    for cells in (
        ["b", "30", "1e+03", "cls", "8", "-", "2.5", "3"],
        ["b", "cls", "0.432", "0.125", "-0.01", "0.5"],
        ["b", "0.875", "30"],
    ):
        assert "".join(f"<td>{cell}</td>" for cell in cells) in section
    assert "Selection within 30.5 GFLOPs" in section
    assert SCRIPT not in text and section.count("&lt;script&gt;") == 3
    assert "left out: it costs 1.5 GFLOPs" in section and 'width="900"' in section


@pytest.mark.parametrize("found", [[], {"teachers": 3}, "{", "[" * 9000, {**FOUND, "pairs": [1]}])
def test_what_is_no_comparison_is_named_and_the_page_is_written(
    tmp_path: Path, found: object
) -> None:
    text = page_of(tmp_path, found)
    assert "teacher_comparison.json is no comparison of teachers" in text
    assert "Likeness of teachers" in text and '<section id="cost"' in text


def test_a_run_without_a_comparison_has_no_section(tmp_path: Path) -> None:
    text = page.render([run_record.read(run_folder(tmp_path / "run"))])
    assert "Comparison of teachers" not in text
