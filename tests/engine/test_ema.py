"""The average of the weights: its arithmetic, and in real runs at every ZeRO stage."""

import json

import pytest
import torch
from runs import ROOT, options, run, together
from safetensors.torch import load_file

from unic_ds import config
from unic_ds.config import ds_config, recipes
from unic_ds.engine import optim, reshard
from unic_ds.engine.ema import KEY, AveragedAdamW, swapped_in
from unic_ds.models.ladder import Head
from unic_ds.models.student import Student

DECAY = 0.9


def two_weights():
    torch.manual_seed(0)
    weights = [torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)]
    groups = [
        {"params": weights[:1], "weight_decay": 0.1},
        {"params": weights[1:], "weight_decay": 0.0},
    ]
    return weights, AveragedAdamW(groups, decay=DECAY, lr=0.1, fused=True)


def step(weights, optimizer, count):
    """`count` steps; the weights after each."""
    after = []
    for _ in range(count):
        for weight in weights:
            weight.grad = weight.detach().sin()
        optimizer.step()
        after.append([w.detach().clone() for w in weights])
    return after


def test_it_is_the_sum_that_it_says_and_the_weights_are_adamw_s():
    weights, optimizer = two_weights()
    expected = [w.detach().clone() for w in weights]
    plain_weights, _ = two_weights()
    plain = torch.optim.AdamW(
        [
            {"params": [w], "weight_decay": d}
            for w, d in zip(plain_weights, (0.1, 0.0), strict=True)
        ],
        lr=0.1,
        fused=True,
    )
    own, other = step(weights, optimizer, 4), step(plain_weights, plain, 4)
    for after, same in zip(own, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(after, same, strict=True))
        expected = [DECAY * e + (1 - DECAY) * w for e, w in zip(expected, after, strict=True)]
    for weight, average in zip(weights, expected, strict=True):
        assert (weight - average).abs().max() > 0.1
        torch.testing.assert_close(optimizer.state[weight][KEY], average, rtol=1e-6, atol=1e-7)


def test_saved_and_loaded_it_goes_on_bit_by_bit():
    weights, optimizer = two_weights()
    step(weights, optimizer, 2)
    saved, there = optimizer.state_dict(), [w.detach().clone() for w in weights]
    again, other = two_weights()
    with torch.no_grad():
        for weight, value in zip(again, there, strict=True):
            weight.copy_(value)
    other.load_state_dict(copied(saved))
    step(weights, optimizer, 2)
    step(again, other, 2)
    for one, two in zip(weights, again, strict=True):
        assert torch.equal(optimizer.state[one][KEY], other.state[two][KEY])


def copied(saved):
    """A state dict whose tensors are its own."""
    state = {
        index: {key: value.clone() for key, value in values.items()}
        for index, values in saved["state"].items()
    }
    return saved | {"state": state}


def test_a_weight_without_a_gradient_waits():
    weights, optimizer = two_weights()
    weights[0].grad = torch.ones(5)
    optimizer.step()
    assert weights[1] not in optimizer.state
    start = weights[1].detach().clone()
    after = step(weights, optimizer, 1)[0][1]
    torch.testing.assert_close(
        optimizer.state[weights[1]][KEY], DECAY * start + (1 - DECAY) * after
    )


def test_the_exchange_is_undone_even_after_an_error():
    weights, optimizer = two_weights()
    step(weights, optimizer, 2)
    before = [w.detach().clone() for w in weights]
    averages = [optimizer.state[w][KEY].clone() for w in weights]
    with pytest.raises(KeyError), swapped_in(optimizer):
        assert all(torch.equal(w, a) for w, a in zip(weights, averages, strict=True))
        raise KeyError
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    for weight, average in zip(weights, averages, strict=True):
        assert torch.equal(optimizer.state[weight][KEY], average)


@pytest.mark.parametrize("offload", [{"device": "nvme"}, {"device": "cpu", "ratio": 0.5}])
def test_an_average_out_of_reach_is_refused(offload):
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "offload_optimizer": offload},
    }
    with pytest.raises(ValueError, match=r"optim\.ema needs"):
        ds_config.merge(settings, config.Config(optim=config.Optim(ema=0.9)), 1)
    ds_config.merge(settings, config.Config(), 1)


STEPS = 3
RUN = {
    "optim__ema": DECAY,
    "optim__steps": STEPS,
    "optim__warmup_epochs": 0,
    "optim__lr": 2e-3,  # 5e-4 at a batch of 16
    "optim__eps": 1e-6,  # at 1e-8 a rounding of a gradient near nothing becomes 1e-6 of a weight
    "run__save_every": 1,
    "run__keep_last": STEPS,
    "eval__on": "false",
}
"""Three steps at the full rate, a checkpoint after each."""
BF16 = RUN | {"precision": ""}


@pytest.fixture(scope="module")
def folders(demonstration, tmp_path_factory):
    """Runs of two ranks in one launch, by name; `zeroN_resumed` begin at step 2 of another."""
    out = tmp_path_factory.mktemp("averages")
    settings = json.loads((ROOT / "ds_configs" / "zero1.json").read_text())
    (out / "zero0.json").write_text(json.dumps(settings | {"zero_optimization": {"stage": 0}}))
    zero0 = {"ds_config": out / "zero0.json"}
    plan = [options(out / "zero0", **RUN, **zero0), options(out / "zero0_bf16", **BF16, **zero0)]
    for zero in ("zero1", "zero2", "zero3"):
        plan.append(options(out / zero, zero=zero, **RUN))
        middle = out / zero / "checkpoints" / "step_0000002"
        plan.append(options(out / f"{zero}_resumed", zero=zero, **RUN, resume=middle))
    plan.append(options(out / "zero2_bf16", zero="zero2", **BF16))
    plan.append(options(out / "zero3_offload", zero="zero3_offload", **BF16))
    (out / "plan.json").write_text(json.dumps(plan))
    run(together(out / "plan.json"))
    return out


def exported(folder):
    return load_file(folder / "student" / "model.safetensors")


def start_of(folder):
    """The encoder before the first step: a function of (seed, name), rounded where it is bf16."""
    cfg = recipes.read(folder / "config.yaml")
    state = Student(cfg.student, cfg.ladder, {}, seed=cfg.seed).encoder.state_dict()
    bf16 = json.loads((folder / "ds_config.json").read_text())["bf16"]["enabled"]
    return {k: v.bfloat16().float() if bf16 else v for k, v in state.items()}


def encoder_after(folder, step):
    """The fp32 encoder that a checkpoint holds, read without our own code."""
    shards = folder / "checkpoints" / f"step_{step:07d}" / "zero"
    if any(shards.glob("*_optim_states.pt")):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(str(shards.parent), tag=shards.name)
    else:
        saved = torch.load(next(shards.glob("*model_states.pt")), weights_only=False)
        state = saved["module"] | masters_by_name(folder, saved["optimizer"])
    return {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}


def masters_by_name(folder, saved):
    """ZeRO-0's fp32 masters in bf16: DeepSpeed saves them in the order of the groups."""
    if "fp32_groups" not in saved:
        return {}
    cfg = recipes.read(folder / "config.yaml")
    student = Student(cfg.student, cfg.ladder, {"effnet": Head(1280), "dinov2": Head(384)}, seed=0)
    names = {parameter: name for name, parameter in student.named_parameters()}
    groups = optim.groups(student, cfg.optim.weight_decay)
    pairs = zip(groups, saved["fp32_groups"], strict=True)
    return {
        names[p]: value
        for group, values in pairs
        for p, value in zip(group["params"], values, strict=True)
    }


ALL = ("zero0", "zero0_bf16", "zero1", "zero2", "zero3", "zero2_bf16", "zero3_offload")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_export_is_the_average_of_all_weights_from_the_first(folders, name):
    folder = folders / name
    start = start_of(folder)
    expected = {k: v.double() for k, v in start.items()}
    for step in range(1, STEPS + 1):
        after = start | encoder_after(folder, step)  # ZeRO-1's shards lack the frozen norm
        expected = {k: DECAY * v + (1 - DECAY) * after[k].double() for k, v in expected.items()}
    found = exported(folder)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-7)
    gaps = [(after[k].double() - v).abs().max().item() for k, v in found.items()]
    assert max(gaps) > 5e-4  # it is not the last weights


@pytest.mark.slow
def test_stages_agree_on_it(folders):
    first = exported(folders / "zero1")
    for name in ("zero0", "zero2", "zero3"):
        for key, value in exported(folders / name).items():
            torch.testing.assert_close(value, first[key], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_resumed_it_is_the_same_bit_for_bit(folders, zero):
    straight, resumed = exported(folders / zero), exported(folders / f"{zero}_resumed")
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if "zero0" not in name])
def test_it_can_be_read_from_the_shards(folders, name):
    shards = folders / name / "checkpoints" / f"step_{STEPS:07d}" / "zero"
    found = reshard.weights(shards)
    for key, value in exported(folders / name).items():
        assert torch.equal(found[f"encoder.{key}"], value), key


@pytest.mark.slow
def test_shards_of_no_zero_are_refused(folders):
    shards = folders / "zero0" / "checkpoints" / f"step_{STEPS:07d}" / "zero"
    with pytest.raises(ValueError, match="saved under ZeRO-0"):
        reshard.weights(shards)
