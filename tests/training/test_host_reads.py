"""A step of ours makes the host wait for nothing between log lines, and knows no single image."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from ds_settings import ds_settings
from host_reads import HostReads
from runs import QUICK, ROOT, SMALL, run, together

HERE = {"here": Path(__file__).parent}
X, S, TWO = torch.tensor([1.0, 2.0, 0.0]), torch.tensor(2.0), torch.tensor(2)

PLANTED = {
    "item": lambda: S.item(),
    "float": lambda: float(S),
    "int": lambda: int(TWO),
    "bool": lambda: bool(S),
    "if": lambda: 1 if S else 0,
    "isfinite": lambda: math.isfinite(S),
    "comparison": lambda: max(S, X[0]),
    "format": lambda: f"{S:.2f}",
    "repr": lambda: str(X),
    "range": lambda: range(TWO),
    "slice": lambda: X[:TWO],
    "shape": lambda: torch.zeros(TWO),
    "list": lambda: torch.tensor([S, S]),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "asarray": lambda: np.asarray(X),
    "cpu": lambda: X.cpu(),
    "to": lambda: X.to("cpu"),
    "contains": lambda: 2.0 in X,
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 0),
    "masked_select": lambda: X.masked_select(X > 0),
    "mask": lambda: X[X > 0],
    "masked write": lambda: X.clone().__setitem__(X > 0, 1.0),
    "unique": lambda: X.unique(),
    "repeat": lambda: X.repeat_interleave(torch.tensor([1, 1, 2])),
    "upload": lambda: torch.tensor(1.0, device=X.device),
    "list as index": lambda: X[[0, 2]],
    "fill": lambda: X.masked_fill(X > 0, S),
    "fill in place": lambda: X.clone().masked_fill_(X > 0, S),
}

HARMLESS = {
    "where with a scalar": lambda: torch.where(X > S, X, S),
    "masked_fill": lambda: X.masked_fill(X > 0, 0.0),
    "scatter": lambda: X.scatter(0, X.argmax(0, keepdim=True), 1.0),
    "gather": lambda: X[torch.tensor([0, 2])],
    "scale": lambda: X * S + X.clamp(min=S),
    "stack": lambda: torch.stack([S, S]),
    "length": lambda: len(X) + X.numel() + X.shape[0],
    "host to device": lambda: torch.from_numpy(np.zeros(3)).float().to(X.device),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_read_is_found_where_it_is(name):
    with HostReads(HERE) as reads:
        PLANTED[name]()
    assert sum(reads.of("here").values()) == len(reads.reads) == 1
    assert reads.reads[0].where == "test_host_reads.py:<lambda>"


@pytest.mark.parametrize("name", HARMLESS)
def test_what_stays_on_the_device_is_no_read(name):
    with HostReads(HERE) as reads:
        HARMLESS[name]()
    assert reads.reads == []


def test_a_read_belongs_to_the_nearest_root_else_to_the_graph():
    """Here `torch.nn` stands for a library whose own reads are not ours."""
    weight = torch.ones(3, requires_grad=True)
    masked = weight[X > 0].sum()
    roots = HERE | {"library": Path(torch.nn.__file__).parent}
    with HostReads(roots) as reads:
        masked.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)
    assert reads.of("here") == Counter()
    assert reads.of("backward") == Counter({"autograd: index_put": 1})
    assert set(reads.of("library")) == {"utils/clip_grad.py:_get_total_norm: __bool__"}


def test_nothing_is_counted_outside():
    with HostReads(HERE) as reads:
        pass
    S.item()
    assert (reads.reads, reads.operators) == ([], {})


RUNS = {  # name: stage, micro batch, images per step
    "zero0": (0, 8, 8),
    "zero1": (1, 4, 8),
    "zero2": (2, 8, 8),
    "zero3": (3, 8, 8),
    "few": (2, 4, 4),
    "lazy": (2, 8, 8),
}
LAZY = {"drop.lazy": "true", "drop.full_every": 3}
LOGGED = 3
"""The step with a log line, of the 2, 3 and 4 that are counted."""


def arguments(folder: Path, name: str) -> list[str]:
    """The command line of a run of five steps with a student in bf16, as recipes are."""
    stage, micro, batch = RUNS[name]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    zero |= {"overlap_comm": True, "contiguous_gradients": True}
    bf16 = {"enabled": True} | ({"check_grad_overflow": False} if stage in (1, 2) else {})
    settings = ds_settings(micro, zero, bf16=bf16, communication_data_type="fp32")
    (folder / f"{name}.json").write_text(json.dumps(settings))
    more = {"ds_config": folder / f"{name}.json", "out": folder / name}
    more |= {"optim.batch_size": batch, "optim.steps": 6, "run.stop_at": 5}
    more |= {"run.log_every": LOGGED, "ladder.rungs": "5,11", "eval.on": "false", "precision": ""}
    more = SMALL | QUICK | more | (LAZY if name == "lazy" else {})
    return [word for key, value in more.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def counted(demonstration, tmp_path_factory):
    """Counts of steps 2, 3 and 4 of each run, made in a process of their own."""
    folder = tmp_path_factory.mktemp("counted")
    (folder / "plan.json").write_text(json.dumps([arguments(folder, name) for name in RUNS]))
    run(together(folder / "plan.json", 1, "counted_runs.py"))
    rows = {name: json.loads((folder / name / "reads.json").read_text()) for name in RUNS}
    return {name: dict(zip((2, 3, 4), steps, strict=True)) for name, steps in rows.items()}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "lazy"])
def test_a_whole_step_reads_nothing_and_a_log_line_once(counted, name):
    for step, row in counted[name].items():
        assert row["operators"]["mm"] > 50  # it did see a step
        assert row["ours"] == (
            {"training/run_log.py:write: tolist": 1} if step == LOGGED else {}
        ), step
        assert row["backward"] == row["elsewhere"] == {}, step


def test_lazy_dropping_reads_once_after_a_full_step(counted):
    """Steps 1 and 3 are full; the next one reads the teacher that they have found."""
    read = {"losses/dropping.py:choose_pairs: tolist": 1}
    logged = {"training/run_log.py:write: tolist": 1}
    assert [counted["lazy"][step]["ours"] for step in (2, 3, 4)] == [read, logged, read]


ZERO3 = {
    "runtime/zero/stage3.py:get_grad_norm_direct: tensor": 2,
    "runtime/utils.py:is_invalid_grad_norm: __bool__": 1,
}
ZERO0 = {
    "runtime/utils.py:has_overflow_serial: __bool__",  # for each parameter
    "runtime/utils.py:has_overflow: item",
    "runtime/utils.py:get_weight_norm: __float__",
    "runtime/utils.py:get_weight_norm: item",
}


@pytest.mark.parametrize("name", ["zero1", "zero2", "few"])
def test_deepspeed_reads_nothing_in_a_step_of_zero_1_and_2(counted, name):
    """As shipped: the step guard judges the gradients, whatever the accumulation."""
    shipped = json.loads((ROOT / "ds_configs" / f"zero{RUNS[name][0]}.json").read_text())
    assert shipped["bf16"] == {"enabled": True, "check_grad_overflow": False}
    for row in counted[name].values():
        assert row["deepspeed"] == {}


def test_deepspeed_reads_once_in_a_step_of_zero_3(counted):
    """From the third step on: in the first two, ranks agree on the order of their modules."""
    for step in (3, 4):
        assert counted["zero3"][step]["deepspeed"] == ZERO3


def test_deepspeed_reads_for_each_parameter_under_zero_0_in_bf16(counted):
    for row in counted["zero0"].values():
        assert set(row["deepspeed"]) == ZERO0
        assert row["deepspeed"]["runtime/utils.py:has_overflow: item"] == 1


def test_a_step_runs_as_many_operators_for_8_images_as_for_4(counted):
    for step, row in counted["zero2"].items():
        assert row["operators"] == counted["few"][step]["operators"]
