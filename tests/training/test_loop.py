"""Steps after which an action is due, and the phases that a step announces to the watchdog."""

import json

import pytest
from forked import Forked
from pictures import folder
from runs import ROOT, run, tiny

from unic_ds.training.loop import Cadence


def due(cadence: Cadence, *, last: int = 12, requested: bool = False) -> list[int]:
    """The steps up to `last` after which the action is due."""
    steps = range(1, last + 1)
    return [i for i in steps if cadence.due(i, last=i == last, requested=requested)]


def test_an_action_is_due_after_every_so_many_steps_and_after_the_last() -> None:
    assert due(Cadence(print, every=(5,))) == [5, 10, 12]
    assert due(Cadence(print, every=(4, 6))) == [4, 6, 8, 12]
    assert due(Cadence(print, every=(0, 0))) == [12]
    assert due(Cadence(print, every=(5,), at_end=False)) == [5, 10]
    for at_end in (False, True):
        cadence = Cadence(print, every=(5,), at_end=at_end)
        assert cadence.due(5, last=True, requested=False, stop=True) == at_end


def test_a_request_waits_for_its_own_multiple() -> None:
    cadence = Cadence(print, every=(0,), on_request=5)
    assert due(cadence) == [12]
    assert due(cadence, requested=True) == [5, 10, 12]
    assert due(Cadence(print, every=(5,)), requested=True) == [5, 10, 12]


@pytest.mark.parametrize("compile", ["none", pytest.param("student", marks=pytest.mark.slow)])
def test_a_step_announces_its_phases_and_the_first_one_compiles(tmp_path, compile) -> None:
    folder(tmp_path / "train", 24)
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    file = tmp_path / "zero2.json"
    file.write_text(json.dumps(settings | {"train_micro_batch_size_per_gpu": 4}))
    more = {"ds_config": file, "run.compile": compile, "optim.steps": 2, "eval.on": "false"}
    words = [word for word in tiny(tmp_path, "run", more) if word != "--data.val"]
    words = [word for word in words if word != str(tmp_path / "val")]
    printed = run(Forked(1, [str(ROOT / "tests" / "support" / "announced_phases.py"), *words]))
    micro = ["reading data", "teachers", "student", "backward"]
    names = [*micro, *micro, "end of step"]
    first = names if compile == "none" else ["compiling"] * len(names)
    expected = [[name, 1] for name in first] + [[name, 2] for name in names]
    assert json.loads(printed.splitlines()[-1]) == expected
