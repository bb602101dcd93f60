"""One answer however a run is spread over ranks, ZeRO stages, micro batches and accumulation.

What was measured stands in docs/faithfulness.md.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ds_settings import ds_settings
from runs import DEMONSTRATION, SMALL, curve, kill_group, start, statistics, together

pytestmark = DEMONSTRATION

BATCH, STEPS = 8, 20
SCIENCE = SMALL | {
    "precision": "",  # what the ds_config says
    "teachers.dinov2.precision": "fp32",
    "teachers.effnet.precision": "fp32",
    "optim.batch_size": BATCH,
    "optim.lr": "1e-3",
    "optim.lr_scaling": "none",
    "optim.warmup_epochs": "0.02",  # 5 steps from 0
    "optim.steps": "24",
    "run.stop_at": STEPS,  # saves the statistics; nothing is exported
    "ladder.rungs": "5,11",
    "ladder.width": "96",
    "eval.on": "false",
}


class Spread(NamedTuple):
    """Division of a run's batch over ranks, micro batches and accumulation."""

    ranks: int
    stage: int
    accumulation: int
    precision: str = "fp32"
    clip: float = 0.0
    kernels: str = "fused"

    @property
    def micro(self) -> int:
        return BATCH // (self.ranks * self.accumulation)


class Answer(NamedTuple):
    """A run's end state."""

    losses: list[float]
    rows: dict[int, dict]
    weights: str  # digest of the initial ones
    statistics: dict[str, torch.Tensor]


def arguments(folder: Path, spread: Spread) -> list[str]:
    """The command line of a run, its ds_config written to `folder`."""
    name = "_".join(map(str, spread))
    zero = {"stage": spread.stage, "stage3_param_persistence_threshold": 0}
    zero |= {"overlap_comm": True, "contiguous_gradients": True}
    settings = ds_settings(spread.micro, zero, bf16={"enabled": spread.precision == "bf16"})
    calm = {}
    if spread.precision == "bf16":
        settings["communication_data_type"] = "fp32"
        calm = {"optim.lr": "1e-4"}  # at 1e-3 a rounding grows 1.7-fold a step, whatever the spread
    (folder / f"{name}.json").write_text(json.dumps(settings))
    more = {"ds_config": folder / f"{name}.json", "out": folder / name}
    more |= {"optim.clip": spread.clip, "kernels": spread.kernels} | calm
    return [word for key, value in (SCIENCE | more).items() for word in (f"--{key}", str(value))]


def launch(folder: Path, ranks: int, spreads: list[Spread]):
    """One launch of so many ranks, which makes its runs one after another."""
    plan = folder / f"plan_{ranks}.json"
    plan.write_text(json.dumps([arguments(folder, s) for s in spreads if s.ranks == ranks]))
    return start(together(plan, ranks, "noted_runs.py"))


def answers(folder: Path, spreads: list[Spread]) -> dict[Spread, Answer]:
    """The answers of all runs: a launch for each number of ranks, all at once."""
    launches = [launch(folder, ranks, spreads) for ranks in sorted({s.ranks for s in spreads})]
    try:
        for process in launches:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in launches:
            if process.poll() is None:
                kill_group(process)
    return {spread: answer(folder / "_".join(map(str, spread))) for spread in spreads}


def answer(out: Path) -> Answer:
    """End state that a run's folder holds."""
    rows = curve(out)
    assert list(rows) == list(range(1, STEPS + 1))
    (weights,) = json.loads((out / "weights.json").read_text())
    saved = statistics(out / "checkpoints" / f"step_{STEPS:07d}")
    return Answer([row["loss"] for row in rows.values()], rows, weights, saved)


def gaps(a: Answer, b: Answer) -> list[float]:
    """Relative differences of two loss curves."""
    return [abs(x / y - 1) for x, y in zip(a.losses, b.losses, strict=True)]


def assert_same(found: dict[Spread, Answer]) -> None:
    """fp32: the same initial weights, decisions, statistics and losses in all runs."""
    whole = next(iter(found.values()))
    for spread, other in found.items():
        assert other.weights == whole.weights, spread
        assert max(gaps(other, whole)) < 1e-5, (spread, gaps(other, whole))
        for step, row in other.rows.items():
            kept = [[r[f"{t}/kept"] for t in ("effnet", "dinov2")] for r in (row, whole.rows[step])]
            assert kept[0] == pytest.approx(kept[1], abs=1e-6), (spread, step)
        assert_same_statistics(other.statistics, whole.statistics, spread)


def assert_same_statistics(one: dict, other: dict, spread: Spread) -> None:
    """Running means and stds equal to 1e-6 of the channel's own scale."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = other[name].abs() + other[name.replace("mean_2C", "std_2C")]
        gap = ((value - other[name]).abs() / scale).max().item()
        assert gap < 1e-6, (spread, name, gap)


def assert_learns(found: Answer) -> None:
    """Not a curve that stands still: a student of zero rate keeps its patches' first cosine."""
    first, last = (found.rows[step]["dinov2/patch_cosine"] for step in (1, STEPS))
    assert last > first + 0.1
    assert found.rows[1]["lr"] == 0 < found.rows[STEPS]["lr"]


COVER = [
    *(Spread(1, 0, 1), Spread(1, 2, 4), Spread(1, 3, 2), Spread(2, 0, 2), Spread(2, 1, 1)),
    *(Spread(2, 2, 2), Spread(2, 3, 4), Spread(4, 2, 1), Spread(4, 3, 2)),
    Spread(1, 2, 1, kernels="reference"),
]
"""Each stage on two ranks, ZeRO-2 and 3 on one, two and four; every accumulation."""

CLIPPED = [Spread(1, stage, 1, clip=0.3) for stage in (0, 2, 3)]

HALF = [
    *(Spread(1, 1, 1, "bf16"), Spread(1, 3, 1, "bf16"), Spread(1, 2, 2, "bf16")),
    *(Spread(2, 1, 1, "bf16"), Spread(2, 3, 1, "bf16")),
]

EVERY = [
    Spread(ranks, stage, accumulation)
    for ranks in (1, 2, 4)
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 2, 4)
    if ranks * accumulation <= BATCH
]


@pytest.mark.dist
@pytest.mark.lengthy
@pytest.mark.slow
def test_the_matrix_gives_one_answer(tmp_path):
    """fp32 exactly; clipped, exactly another one; bf16 as closely as it was measured to."""
    found = answers(tmp_path, COVER + CLIPPED + HALF)
    assert_learns(found[COVER[0]])
    assert_same({spread: found[spread] for spread in COVER})
    assert_same({spread: found[spread] for spread in CLIPPED})
    assert max(gaps(found[CLIPPED[0]], found[COVER[0]])) > 1e-3  # the clipping did bind
    assert_close({spread: found[spread] for spread in HALF})


def assert_close(found: dict[Spread, Answer]) -> None:
    """bf16: the same initial weights, statistics and first losses; then rounding shows."""
    whole = next(iter(found.values()))
    for spread, other in found.items():
        assert other.weights == whole.weights, spread
        assert_same_statistics(other.statistics, whole.statistics, spread)
        gap = gaps(other, whole)
        assert max(gap[:2]) < 1e-6, (spread, gap)  # the rate of step 1 is 0
        assert max(gap) < 1e-3, (spread, gap)


@pytest.mark.dist
@pytest.mark.soak
def test_eight_ranks_give_the_curve_of_one(tmp_path):
    assert_same(answers(tmp_path, [Spread(1, 2, 1), Spread(8, 2, 1), Spread(8, 3, 1)]))


@pytest.mark.dist
@pytest.mark.soak
def test_every_spread_gives_one_answer(tmp_path):
    assert_same(answers(tmp_path, EVERY))
