"""Tasks on class labels find the same scores on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dealt_tasks import TASKS, Found, scores_of_all
from forked import Forked
from runs import SUPPORT, run


@pytest.mark.dist
def test_two_ranks_find_the_scores_of_one(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    run(Forked(2, [str(SUPPORT / "dealt_tasks.py"), str(file)]))
    both = [Found(*found) for found in json.loads(file.read_text())]
    assert both[0] == both[1]
    first, pruned, refusals = both[0]
    assert pruned == ["replicate"]
    differing = "the ranks found different images; wait until the folder is complete"
    assert refusals == [differing, differing]
    alone = scores_of_all()
    assert {name.split()[0] for _, name, *_ in alone} == {*TASKS, "one"}
    for (model, name, value, protocol), expected in zip(first, alone, strict=True):
        assert (model, name, protocol) == (expected[0], expected[1], expected[3])
        exact = name.startswith(("rankme", "retrieval", "one"))
        # A probe's row may fall to the other side of a boundary: one of 85.
        bounds = {"rel": 1e-5} if exact else {"abs": 1.2}
        assert value == pytest.approx(expected[2], **bounds)
    values = {(model, name): value for model, name, value, _ in alone}
    assert values["narrow", "robustness val"] > 50 < values["layer", "robustness val"]
    assert values["narrow", "retrieval R@1"] > 40 and 2 < values["layer", "rankme"] < 12
