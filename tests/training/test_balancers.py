"""Balancers and terms with a state: one answer however a run is spread, stopped or resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import folder
from runs import curve, run, statistics, tiny_spread, together

STEPS = 6
RUN = {
    "balance.momentum": 0.5,
    "balance.rate": 0.2,
    "loss.cls": "0.5 cosine + dispersion + relational",
    "optim.steps": STEPS,
    "optim.lr": "1e-2",
    "eval.on": "false",
    "run.save_every": 3,
}
SPREADS = {
    "famo": {1: [("whole", 1)], 2: [("split", 3), ("resumed", 2)]},
    "mgda": {1: [("whole", 2)], 2: [("split", 1), ("resumed", 2)]},
}
"""Balancer -> ranks -> runs, each with a ZeRO stage."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of each balancer on one rank and two, one of them stopped and resumed."""
    root = tmp_path_factory.mktemp("balancers")
    folder(root / "train", 24)
    folder(root / "val", 4)
    for ranks in (1, 2):
        plan: list[list[str]] = []
        for kind, places in SPREADS.items():
            for name, stage in places[ranks]:
                given = RUN | {"balance.kind": kind}
                stops = (3, STEPS) if name == "resumed" else (STEPS,)
                plan += [
                    tiny_spread(
                        root,
                        f"{kind} {name}",
                        given | {"run.stop_at": stop},
                        micro=8 // ranks,
                        stage=stage,
                    )
                    for stop in stops
                ]
        file = root / f"plan{ranks}.json"
        file.write_text(json.dumps(plan))
        run(together(file, ranks))
    return root


def end_state(out: Path) -> dict[str, torch.Tensor]:
    """Statistics of targets and dispersions, and the balancer's state."""
    return statistics(out / "checkpoints" / f"step_{STEPS:07d}")


@pytest.mark.dist
@pytest.mark.parametrize("kind", SPREADS)
def test_ranks_stages_and_a_restart_do_not_change_it(images: Path, kind: str) -> None:
    whole: dict[int, dict[str, Any]] = curve(images / f"{kind} whole")
    weights = [row["wide/weight"] for row in whole.values()]
    assert weights[0] == pytest.approx(0.5)
    assert abs(weights[-1] - 0.5) > 0.01
    for name in ("split", "resumed"):
        found = curve(images / f"{kind} {name}")
        assert found.keys() == whole.keys()
        for step, row in whole.items():
            for value in ("loss", "wide/weight", "narrow/weight"):
                assert found[step][value] == pytest.approx(row[value], rel=1e-4), (name, step)
        one, other = end_state(images / f"{kind} whole"), end_state(images / f"{kind} {name}")
        assert one.keys() == other.keys()
        assert {key.split("/")[0] for key in one if "/" in key} == {"balance", "dispersion"}
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-5, msg=key)
