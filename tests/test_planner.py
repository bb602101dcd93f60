"""`unic-ds plan`: what it says of a run, and how it answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from unic_ds import cli, config, ds_config, entry, gpus

SMALL = ["plan", "--recipe", "unic_b", "--student.model", "vit_tiny_patch16_224"]
TEACHER = ["--teachers", "t=timm:vit_tiny_patch16_224", "--student.size", "64"]


def ask(capfd, *options):
    """(exit code, what was printed) of a plan."""
    code = entry.run(cli.verb, [*SMALL, *TEACHER, *options])
    out, err = capfd.readouterr()
    return code, out or err


def test_what_fits_is_said_with_its_parts(capfd):
    code, out = ask(capfd, "--gpus", "8", "--json")
    (plan,) = json.loads(out)
    assert code == 0 and plan["fits"] and plan["micro_batch"] == 32 and plan["accumulation"] == 2
    assert plan["needs_gb"] == pytest.approx(sum(plan["memory_gb"].values()))
    assert 0 < plan["mfu"] < 1 and plan["images_per_s"] * sum(plan["seconds"].values()) == (
        pytest.approx(512)
    )


def test_what_does_not_fit_fails_with_the_remedy(capfd, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text("memory_gb: 2\ntflops: 10\nmemory_gb_s: 100\nnode_gb_s: 10\nnet_gb_s: 1\n")
    code, out = ask(capfd, "--gpus", "8", "--gpu", str(file))
    assert code == 1 and "does NOT fit" in out and "--search" in out


def test_a_search_lists_what_fits_fastest_first(capfd):
    _, out = ask(capfd, "--gpus", "8", "--search", "--json")
    plans = json.loads(out)
    paces = [plan["images_per_s"] for plan in plans]
    assert paces == sorted(paces, reverse=True) and all(plan["fits"] for plan in plans)
    assert {plan["zero_stage"] for plan in plans} == {1, 2, 3}
    assert {plan["checkpoint"] for plan in plans} == {"none", "every:2", "full"}
    needs = {(p["zero_stage"], p["micro_batch"], p["checkpoint"]): p["needs_gb"] for p in plans}
    assert needs[2, 64, "full"] < needs[2, 64, "every:2"] < needs[2, 64, "none"]


def test_a_search_spreads_and_offloads_only_what_does_not_fit_without(capfd, tmp_path):
    """On a GPU with room for the smallest of what it finds on this one, and on one with less."""
    row = {"tflops": 100, "memory_gb_s": 1000, "node_gb_s": 100, "net_gb_s": 10}
    file, room, found = tmp_path / "gpu.yaml", 80.0, []
    for _ in range(3):
        file.write_text(json.dumps(row | {"memory_gb": room}))
        _, out = ask(capfd, "--gpus", "8", "--search", "--json", "--gpu", str(file))
        found.append(json.loads(out))
        room = min(plan["needs_gb"] for plan in found[0]) + (1e-6 if len(found) == 1 else -1e-6)
    ways = [{(p["placement"]["t"], p["optimiser"]) for p in plans} for plans in found]
    assert ways[0] == {("replicate", "GPU")} < ways[1]
    assert ways[2] and ("replicate", "GPU") not in ways[2]
    for plan in (p for plans in found for p in plans):
        assert (plan["seconds"]["PCIe"] > 0) == (plan["optimiser"] == "CPU")


def test_a_compiled_student_is_not_searched_under_zero3(capfd):
    _, out = ask(capfd, "--gpus", "8", "--search", "--json", "--run.compile", "student")
    assert {plan["zero_stage"] for plan in json.loads(out)} == {1, 2}


def test_a_teacher_of_the_cache_costs_nothing(capfd, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "teachers": {"t": {}}}))
    (plain,), (stored,) = (
        json.loads(ask(capfd, "--json", *more)[1])
        for more in ([], ["--teachers.cache", str(tmp_path)])
    )
    assert stored["seconds"]["teachers"] == 0 < plain["seconds"]["teachers"]
    assert stored["memory_gb"]["teachers"] == 0 < plain["memory_gb"]["teachers"]
    assert stored["memory_gb"]["targets"] == plain["memory_gb"]["targets"]
    assert stored["seconds"]["encoder"] == plain["seconds"]["encoder"]
    code, said = ask(capfd, "--teachers.cache", str(tmp_path / "none"))
    assert code == 2 and "holds no manifest.json" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h1000"], "did you mean h100-80"),
        (["--gpus", "0"], "--gpus must be positive"),
        (["--gpus", "7"], "is not a multiple of 7 ranks"),
        (["--efficiency", "students=.4"], "has no 'students'"),
        (["--efficiency", "student=4"], "must be in (0, 1]"),
        (["--gpu", "missing.yaml"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(capfd, options, message):
    code, out = ask(capfd, *options)
    assert code == 2 and message in out and out.count("\n") == 1


def test_measured_efficiencies_replace_the_assumed(capfd):
    (slow,), (fast,) = (
        json.loads(ask(capfd, "--json", "--efficiency", f"teachers={share}")[1])
        for share in ("0.1", "0.5")
    )
    assert slow["seconds"]["teachers"] == pytest.approx(5 * fast["seconds"]["teachers"])
    assert slow["seconds"]["encoder"] == fast["seconds"]["encoder"]


@pytest.mark.parametrize(("batch", "world", "micro"), [(512, 8, 32), (4096, 256, 16), (100, 1, 25)])
def test_the_micro_batch_is_the_largest_that_divides_a_ranks_share(batch, world, micro):
    cfg = config.Config(optim=replace(config.Optim(), batch_size=batch))
    merged = ds_config.merge({"train_micro_batch_size_per_gpu": 32}, cfg, world)
    assert merged["train_micro_batch_size_per_gpu"] == micro
    assert merged["gradient_accumulation_steps"] * micro * world == batch


def test_the_peak_of_a_device_is_known_by_its_name():
    assert gpus.peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert gpus.peak_tflops("NVIDIA GH200 480GB") == 989
    assert gpus.peak_tflops("Tesla T4") is None
