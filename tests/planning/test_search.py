"""`unic-ds plan`: what it says of a run, and how it answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from runs import ROOT, SUPPORT, launch, run

from unic_ds import cli, config
from unic_ds.config import ds_config
from unic_ds.planning import gpus, search, step_time
from unic_ds.planning.counters import Meter, flop_counter
from unic_ds.process import entry_point

SMALL = ["plan", "--recipe", "unic_b", "--student.model", "vit_tiny_patch16_224"]
TEACHER = ["--teachers", "t=timm:vit_tiny_patch16_224", "--student.size", "64"]


def ask(capfd, *options):
    """(exit code, what was printed) of a plan."""
    given = [] if "--teachers" in options else TEACHER
    code = entry_point.run(cli.dispatch, [*SMALL, *given, *options])
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
        for part in ("PCIe", "waits for the GPU"):
            assert (plan["seconds"][part] > 0) == (plan["optimiser"] == "CPU")


def test_a_run_that_draws_its_resolution_has_the_memory_of_the_largest(capfd):
    """Its times are means over the sides, each with its micro batches."""
    drawn = ("--gpus", "8", "--json", "--data.sizes", "32,64,96")
    (plan,) = json.loads(ask(capfd, *drawn)[1])
    assert plan["splits"] == {"32": [64, 1], "64": [32, 2], "96": [8, 8]}
    alone = []
    for size, (micro, _) in plan["splits"].items():
        file = ds_config.read("ds_configs/zero2.json") | {"train_micro_batch_size_per_gpu": micro}
        cfg = config.Config(
            teachers=(config.Teacher(name="t", source="timm:vit_tiny_patch16_224"),),
            student=config.Student(model="vit_tiny_patch16_224", size=int(size)),
        )
        made = search.plan_stages(
            cfg, file, gpus.get("h100-80"), 8, images=10_000, efficiency=gpus.Efficiency()
        )
        alone.append(made[0])
    assert plan["needs_gb"] == pytest.approx(max(one.needs_gb for one in alone))
    seconds = [sum(one.seconds.values()) for one in alone]
    assert sum(plan["seconds"].values()) == pytest.approx(sum(seconds) / 3)
    assert plan["images_per_s"] == pytest.approx(512 / (sum(seconds) / 3))
    _, out = ask(capfd, *drawn, "--search")
    assert min(found["micro_batch"] for found in json.loads(out)) >= 4  # 36 of 16 tokens
    _, out = ask(capfd, *drawn, "--search", "--data.tokens", "72")
    assert len({found["micro_batch"] for found in json.loads(out)}) == 1
    code, out = ask(capfd, *drawn[:2], *drawn[3:])
    assert code == 0 and "micro batch 64 x 1 at 32 px, 32 x 2 at 64 px, 8 x 8 at 96 px" in out


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


def test_a_large_run_takes_what_its_arithmetic_says(capfd):
    """UNIC-L on 64 H100 by hand: 340 ms a step at 336 px, 163 + 85 + 34 of them in models."""
    assert (
        entry_point.run(cli.dispatch, ["plan", "--recipe", "unic_l", "--gpus", "64", "--json"]) == 0
    )
    small, large = json.loads(capfd.readouterr()[0])
    assert sum(small["seconds"].values()) == pytest.approx(0.150, rel=0.15)
    assert sum(large["seconds"].values()) == pytest.approx(0.340, rel=0.15)
    by_hand = {"teachers": 0.163, "encoder": 0.085, "ladder": 0.034}
    for part, seconds in by_hand.items():
        assert large["seconds"][part] == pytest.approx(seconds, rel=0.1)
    share = large["moved_seconds"]["teachers"] / large["seconds"]["teachers"]
    assert 0.25 < share < 0.40 and large["bound"] == "GPU"


def seconds(capfd, *options):
    """The first stage's plan, and the seconds of its step."""
    _, out = ask(capfd, "--json", *options)
    plan = json.loads(out)[0]
    return plan, sum(plan["seconds"].values())


def test_small_micro_batches_wait_for_the_host(capfd):
    few, few_s = seconds(capfd, "--gpus", "512")
    half, half_s = seconds(capfd, "--gpus", "256")
    assert few["micro_batch"] * 2 == half["micro_batch"] and few["bound"] == "host"
    queueing = sum(few["host_seconds"].values())
    assert few_s == pytest.approx(queueing)
    assert half_s == pytest.approx(few_s, rel=0.01)  # however many images
    slow = ("matmul=1e-4", "attention=1e-4", "ladder=1e-4", "memory=1e-4")
    busy, busy_s = seconds(capfd, "--gpus", "256", "--efficiency", ",".join(slow))
    assert busy["seconds"]["host not hidden"] == 0 and busy["bound"] == "GPU"
    assert busy_s > sum(busy["host_seconds"].values())


def test_blocks_that_are_recomputed_are_queued_again(capfd):
    (plain, _), (again, _) = (
        seconds(capfd, "--student.activation_checkpointing", which) for which in ("none", "full")
    )
    assert plain["host_seconds"]["recomputation"] == 0 == plain["seconds"]["recomputation"]
    forward = again["host_seconds"]["student forward"]
    assert 0.5 * forward < again["host_seconds"]["recomputation"] < forward
    assert again["seconds"]["encoder"] == plain["seconds"]["encoder"]
    assert again["moved_seconds"]["recomputation"] > 0


def test_compiled_blocks_move_less_and_queue_less(capfd):
    (eager, _), (compiled, _), (student, _) = (
        seconds(capfd, "--run.compile", which) for which in ("none", "all", "student")
    )
    for part in ("teachers", "encoder"):
        assert compiled["moved_seconds"][part] < 0.8 * eager["moved_seconds"][part]
    for part in ("teachers", "student forward", "student backward"):
        assert compiled["host_seconds"][part] < eager["host_seconds"][part]
    assert student["moved_seconds"]["encoder"] == compiled["moved_seconds"]["encoder"]
    assert student["moved_seconds"]["teachers"] == eager["moved_seconds"]["teachers"]


def test_a_rate_scales_the_kernels_that_it_is_of(capfd):
    base, _ = seconds(capfd)
    slow, _ = seconds(capfd, "--efficiency", "memory=0.388")  # half
    for part in ("teachers", "encoder", "ladder"):
        more = slow["seconds"][part] - base["seconds"][part]
        assert more == pytest.approx(base["moved_seconds"][part])
    assert slow["seconds"]["update"] == base["seconds"]["update"]
    decoded = base["seconds"]["DALI"]
    assert base["micro_batch"] * step_time.PIXELS / step_time.DECODED < decoded / 2
    assert seconds(capfd, "--data.backend", "torch")[0]["seconds"]["DALI"] == 0
    weak, _ = seconds(capfd, "--data.augment", "weak")
    assert 0 < weak["seconds"]["DALI"] < decoded


def test_a_bucket_at_least_hides_behind_nothing(capfd, tmp_path):
    file, found = tmp_path / "ds.json", []
    base = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    for bucket in (1_000_000, 100_000_000):
        base["zero_optimization"]["reduce_bucket_size"] = bucket
        file.write_text(json.dumps(base))
        plan, _ = seconds(capfd, "--gpus", "64", "--ds_config", str(file))
        found.append(plan["seconds"]["communication not hidden"])
    assert found[0] < found[1]


def test_plain_torch_computes_what_teacher_dropping_drops(capfd):
    two = ",".join(f"{name}=timm:vit_tiny_patch16_224" for name in "ab")
    more = ["--teachers", two, "--student.size", "64"]
    (fused, _), (plain, _) = (
        seconds(capfd, *more, "--kernels", kind) for kind in ("fused", "reference")
    )
    assert fused["tflop_per_image"]["ladder"] == pytest.approx(
        plain["tflop_per_image"]["ladder"] * (1 + 2 * 0.75) / 3
    )
    assert plain["moved_seconds"]["ladder"] > 2 * fused["moved_seconds"]["ladder"]


def test_operators_are_counted_by_what_they_read_and_write():
    x, weight = torch.ones(64, 32), torch.ones(32, 32)
    with Meter((x, weight)) as meter:
        doubled = x.mul(2)
        y = doubled.add_(1).T.T  # views cost nothing
        del doubled
        z = y @ weight
        z = z.float().neg().exp()
    work = meter.work()
    assert work.matmul == work.flops == 2 * 64 * 32 * 32
    assert work.moved == 8 * x.nbytes  # four operators read and write
    assert work.moved_fused == 4 * x.nbytes  # two kernels do, neg's result is in no memory
    assert (work.launches, work.launches_fused) == (5, 3)


def test_flops_are_those_of_torchs_counter():
    block = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    image = torch.ones(2, 9, 32)
    with flop_counter() as counter:
        block(image).sum().backward()
    with Meter((image, *block.parameters())) as meter:
        block(image).sum().backward()
    assert meter.flops == counter.get_total_flops() > 0
    assert meter.work().attention > 0


@pytest.mark.soak
@pytest.mark.dist
def test_the_hosts_costs_can_be_measured():
    printed = run(launch(SUPPORT / "host_cost.py", ranks=1))
    found = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
    assert all(value > 0 for value in found.values()) and found["parameters"] == 294
    assert found["student backward by ZeRO-2"] > found["student backward"]
    # An operator takes microseconds, not milliseconds: the costs that the planner knows are near.
    assert step_time.FORWARD_S / 10 < 1e-6 * found["DINOv2-g forward, us an operator"] < 1e-3


@pytest.mark.parametrize(("batch", "world", "micro"), [(512, 8, 32), (4096, 256, 16), (100, 1, 25)])
def test_the_micro_batch_is_the_largest_that_divides_a_ranks_share(batch, world, micro):
    cfg = config.Config(optim=replace(config.Optim(), batch_size=batch))
    merged = ds_config.merge({"train_micro_batch_size_per_gpu": 32}, cfg, world)
    assert merged.micro_batch == micro
    assert merged.accumulation * micro * world == batch


def test_the_peak_of_a_device_is_known_by_its_name():
    assert gpus.peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert gpus.peak_tflops("NVIDIA GH200 480GB") == 989
    assert gpus.peak_tflops("Tesla T4") is None
