"""Teachers spread over ranks or kept in the CPU's memory say what whole ones say, bit by bit."""

from __future__ import annotations

import json
import re

import pytest
import timm
import torch
from runs import DEMONSTRATION, ROOT, alone, curve, options, run, together
from safetensors.torch import save_file

from unic_ds import config
from unic_ds.config import ds_config, recipes
from unic_ds.config.overrides import override_all
from unic_ds.planning import estimate
from unic_ds.planning.trace import teacher_cost, trace
from unic_ds.teachers import quantisation

pytestmark = [DEMONSTRATION, pytest.mark.slow, pytest.mark.dist]

ARCHS = ("test_vit", "test_convnext", "test_efficientnet")
# shares of an evaluation that differ by a batch
RUN = {"optim__steps": 2, "eval__max_train": 65, "eval__max_val": 33, "eval__batch": 16}
RUN |= {"teachers__effnet__channels_last": "false"}
SPREAD = {"teachers__effnet__placement": "shard", "teachers__dinov2__placement": "offload"}
INT8 = {"teachers__dinov2__precision": "int8", "teachers__dinov2__micro": 3, "eval__on": "false"}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """(folder, rows, what was printed) of one launch of two ranks that does everything."""
    folder = tmp_path_factory.mktemp("placed")
    torch.manual_seed(0)
    rows = [{"name": "python", "source": "python:placed_teachers:make", "precision": "fp32"}]
    for arch in ARCHS:
        save_file(timm.create_model(arch).state_dict(), folder / f"{arch}.safetensors")
        source = f"file:{folder}/{arch}.safetensors#arch={arch}"
        rows.append({"name": arch, "source": source, "precision": "fp32"})
    rows.append(rows[1] | {"name": "half", "precision": "bf16"})
    runs = [
        options(folder / "whole", **RUN),
        options(folder / "spread", **RUN, **SPREAD),
        options(folder / "int8", **RUN | INT8),
    ]
    (folder / "plan.json").write_text(json.dumps([rows, runs]))
    printed = run(together(folder / "plan.json", script="placed_teachers.py"))
    return folder, rows, printed


def test_spread_teachers_say_the_same_and_hold_their_share(launch):
    folder, rows, _ = launch
    ranks = [json.loads((folder / f"plan.{rank}").read_text()) for rank in range(2)]
    for row in rows:
        found = [rank[row["name"]] for rank in ranks]
        whole = found[0]["bytes"]
        for placement in ("shard", "offload"):
            for each in found:
                spread = each[placement]
                assert spread["same"] and spread["same facts"] and not spread["trained"]
            shares = [each[placement]["bytes"] for each in found]
            assert sum(shares) == pytest.approx(whole, rel=0.01)  # a scalar counts twice
            assert max(shares) == pytest.approx(whole / 2, rel=0.1)
        if not row["source"].startswith("python"):
            assert teacher_cost(config.Teacher(**row), 4, 2).nbytes == pytest.approx(
                whole, rel=0.01
            )


def test_a_run_with_spread_teachers_is_the_same_run(launch):
    folder, _, _ = launch
    assert curve(folder / "whole") == curve(folder / "spread")
    tables = [json.loads((folder / n / "results.json").read_text()) for n in ("whole", "spread")]
    assert tables[0] == tables[1] and tables[0]["dinov2"]["knn"] > 0
    manifests = [(folder / n / "teachers.json").read_text() for n in ("whole", "spread")]
    assert manifests[0] == manifests[1]


def test_a_run_with_a_quantised_teacher_says_its_fidelity_and_keeps_to_it(launch):
    folder, _, printed = launch
    said = re.findall(r"teacher dinov2 in int8: cosine to bf16 cls (\S+), cls_worst", printed)
    assert len(said) == 1 and quantisation.LEAST <= float(said[0]) <= 1
    manifest = json.loads((folder / "int8" / "teachers.json").read_text())
    assert manifest["dinov2"]["precision"] == "int8"
    assert curve(folder / "int8")[2]["loss"] == pytest.approx(
        curve(folder / "whole")[2]["loss"], rel=0.02
    )
    more = RUN | INT8 | {"optim__steps": 3, "teachers__dinov2__precision": "fp32"}
    said = run(alone(folder / "int8", **more), code=2)
    assert "teachers.dinov2.precision was 'int8', now 'fp32'" in said


@pytest.mark.parametrize(
    ("placement", "share"), [("replicate", 1), ("shard", 1 / 8), ("offload", 0)]
)
def test_the_planner_gives_each_gpu_its_share(placement, share):
    cfg = override_all(
        recipes.get("quickstart"),
        {"student.size": "64", "optim.batch_size": "64", "teachers.effnet.channels_last": "false"}
        | {f"teachers.{n}.size": "56" for n in ("effnet", "dinov2")}
        | {f"teachers.{n}.placement": placement for n in ("effnet", "dinov2")},
    )
    settings = ds_config.merge(ds_config.read(ROOT / "ds_configs" / "zero2.json"), cfg, 16)
    traced = trace(cfg, settings.micro_batch, bf16=True)
    whole = sum(nbytes for _, nbytes in traced.teachers.values())
    held = estimate.memory(settings, cfg, traced, 16, node=8)
    assert held["teachers"] == pytest.approx(share * whole / 1e9)
