"""`unic-ds eval`: a run, its teachers and a baseline in one table; mistakes are one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from pictures import folder
from runs import ROOT, TRAIN, run, tiny

from unic_ds import cli
from unic_ds.process import entry_point

EVAL = [str(ROOT / "unic_ds" / "cli" / "__main__.py"), "eval"]
TASKS = "knn,teacher,rankme"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `run`, trained on images/train and evaluated on images/val."""
    root = tmp_path_factory.mktemp("eval")
    for side, count in (("train", 24), ("val", 17)):
        folder(root / "images" / side, count)
    words = tiny(root / "images", "run", {"out": root / "run", "eval.tasks": TASKS})
    run(Forked(1, [TRAIN, *words]))
    return root


def evaluated(
    root: Path, ranks: int, *more: str, tasks: str = TASKS, teacher: str = "narrow"
) -> str:
    """Output of the command; features are kept in a folder for each number of ranks."""
    models = [root / "run", f"again={root / 'run' / 'student'}", "pixels", teacher]
    words = [tasks, "--models", ",".join(filter(None, map(str, models)))]
    words += ["--eval.data", str(root / "images"), "--eval.k", "3"]
    words += ["--eval.cache", str(root / f"cache{ranks}"), *more]
    return run(Forked(ranks, [*EVAL, *words]))


@pytest.mark.dist
def test_a_run_is_compared_with_its_teachers_on_any_number_of_ranks(made: Path) -> None:
    """The student's values are those of the run's own table; two columns of it are equal."""
    found = []
    for ranks in (1, 2):
        printed = evaluated(made, ranks, "--json", "--out", str(made / f"out{ranks}"))
        found.append(json.loads(printed.splitlines()[-1]))
        written = json.loads((made / f"out{ranks}" / "evaluation.json").read_text())
        assert written == found[-1]
        assert (made / f"out{ranks}" / "results.png").is_file()
    one, two = ({row["name"]: row for row in each["rows"]} for each in found)
    assert found[0]["models"] == {
        "run": "student",
        "again": "student",
        "pixels": "baseline",
        "narrow": "teacher",
    }
    end = json.loads((made / "run" / "evaluation.json").read_text())
    at_end = {row["name"]: row["values"] for row in end["rows"]}
    assert {"knn", "rankme", "teacher narrow cls fidelity"} <= one.keys() == two.keys()
    for name, row in one.items():
        assert row["protocols"].keys() == row["values"].keys()
        assert row["values"]["run"] == row["values"]["again"]
        assert row["values"] == pytest.approx(two[name]["values"], rel=1e-5)
        # The run's teachers were in bf16.
        assert row["values"]["run"] == pytest.approx(at_end[name]["student after"], rel=1e-2)
    knn = one["knn"]
    assert knn["student_minus_best_teacher"]["run"] == pytest.approx(
        knn["values"]["run"] - knn["values"]["narrow"]
    )
    assert found[0]["rows_of_average_rank"] == 1


@pytest.mark.dist
def test_a_finished_task_comes_from_the_cache_and_others_use_its_features(made: Path) -> None:
    """The teacher's code may change, so nothing of it is kept: it is left out."""
    first = evaluated(made, 1, tasks="knn", teacher="")
    assert "as evaluated before" not in first
    again = evaluated(made, 1, tasks="knn,rankme", teacher="")
    assert "to be cached" not in again and again.count("as evaluated before") == 1
    rows = [next(line for line in x.splitlines() if "kNN %" in line) for x in (first, again)]
    assert rows[0].split() == rows[1].split()
    other = evaluated(made, 1, "--eval.temperature", "0.1", tasks="knn", teacher="")
    assert "to be cached" not in other and "as evaluated before" not in other
    assert "knn k=3 T=0.1 cosine 24/17 images 32 px" in other


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown task": (["knm", "--models", "pixels"], "there is no task 'knm' (did you mean knn?)"),
    "no models": (["knn"], "--models is needed, for example --models runs/quickstart,pixels"),
    "no folder": (
        ["knn", "--models", "pixels", "--eval.data", "/nowhere"],
        "--eval.data '/nowhere' is no folder; give one",
    ),
    "other name of the option": (
        ["knn", "--models", "pixels", "--data.eval", "/nowhere"],
        "--eval.data '/nowhere' is no folder; give one",
    ),
    "unknown protocol": (["knn", "--models", "pixels", "--protocol", "x"], "must be one of"),
    "k": (["knn", "--models", "pixels", "--eval.k", "0"], "eval.k must be from 1 to 1,000,000"),
    "size": (["knn", "--models", "pixels", "--eval.size", "99999"], "eval.size must be from 0"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_before_torch_is_imported(case: str, capsys: Any) -> None:
    words, sentence = MISTAKES[case]
    assert entry_point.run(cli.dispatch, ["eval", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("unic_ds: error: ") and said.count("\n") == 1 and sentence in said


IN_VAIN: dict[str, tuple[list[str], str]] = {
    "one class": (["knn", "--eval.data", "one"], "has 1 class folders with training images"),
    "foreign class": (["knn", "--eval.data", "foreign"], "which the training images do not have"),
    "no masks": (["segmentation", "--eval.data", "images"], "has no masks"),
    "no text tower": (["zeroshot", "--eval.data", "images"], "needs a teacher with a text tower"),
    "data of its own": (["depth"], "the task depth needs data of its own; give --eval.data depth="),
}


@pytest.mark.dist
def test_what_cannot_be_evaluated_is_said_before_any_feature(made: Path) -> None:
    folder(made / "one", 6, classes=1)
    for side, classes in (("train", 2), ("val", 3)):
        folder(made / "foreign" / side, 6, classes=classes)
    for words, sentence in IN_VAIN.values():
        given = [str(made / word) if (made / word).is_dir() else word for word in words]
        cache = made / "never"
        more = ["--models", str(made / "run"), "--eval.cache", str(cache)]
        printed = run(Forked(1, [*EVAL, *given, *more]), code=2)
        assert sentence in printed and printed.splitlines()[-1].startswith("unic_ds: error: ")
        assert not cache.exists()
