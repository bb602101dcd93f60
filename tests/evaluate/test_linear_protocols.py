"""Linear probes by the rules of papers, against scikit-learn, Optuna and torch's SGD."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from memory_sets import MemoryImages, columns_model, scores_of
from pictures import folder
from planted_classes import Rows, planted
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import cross_entropy

from unic_ds.config import Config, Eval
from unic_ds.data import scan
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import AugmentedImages, EvalBatch, FeatureSet, Model, Outputs
from unic_ds.evaluate.heads import Heads, Schedule
from unic_ds.evaluate.linear import LARGE, fit_probes, rule_for
from unic_ds.evaluate.linear_optuna import fit_optuna
from unic_ds.evaluate.linear_rates import RATES, fit_rates
from unic_ds.evaluate.linear_sgd import fit_sgd
from unic_ds.evaluate.probe import Probe, accuracy, hold_out, raw
from unic_ds.harness.image_sets import SampledImages

pytestmark = pytest.mark.filterwarnings("error")
CPU = torch.device("cpu")


def sets(rows: Rows) -> tuple[FeatureSet, FeatureSet]:
    """Rows of one rank as features of the model m."""
    pairs = (rows.train_NC, rows.train_label_N), (rows.val_NC, rows.val_label_N)
    train, val = (FeatureSet({"m": x}, torch.arange(len(x)), label_N) for x, label_N in pairs)
    return train, val


def of_equal_scale(rows: Rows) -> Rows:
    """Planted rows whose channels have one scale."""
    scale_C = torch.logspace(0, 3, rows.train_NC.shape[1])
    return rows._replace(train_NC=rows.train_NC * scale_C, val_NC=rows.val_NC * scale_C)


@pytest.mark.parametrize("classes", [2, 5])
def test_optuna_finds_what_it_finds_with_scikit_learn(classes: int) -> None:
    """The same C of 14 trials one after another, and the same probabilities."""
    rows = of_equal_scale(planted(240, 200, 12, classes, gap=1.5))
    train, val = sets(rows)
    probe = fit_optuna(train, seed=3, device=CPU, trials=14)["m"]
    x_NC, label_N = rows.train_NC.numpy(), rows.train_label_N.numpy()
    held_N = hold_out(label_N, 3, floor=True)
    counts_L = np.bincount(label_N)
    assert np.bincount(label_N[held_N]).tolist() == [max(1, int(0.2 * n)) for n in counts_L]

    def fitted(strength: float, kept_N: Any) -> LogisticRegression:
        model = LogisticRegression(C=strength, max_iter=2000, random_state=22)
        return model.fit(x_NC[kept_N], label_N[kept_N])

    def value(trial: optuna.Trial) -> float:
        strength = trial.suggest_float("C", 1e-5, 1e6, log=True)
        return fitted(strength, ~held_N).score(x_NC[held_N], label_N[held_N])

    sampler = optuna.samplers.TPESampler(seed=22, multivariate=False, constant_liar=False)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    study.optimize(value, 14)
    best = fitted(study.best_params["C"], slice(None))
    score = 100 * best.score(rows.val_NC.numpy(), rows.val_label_N.numpy())
    assert accuracy(probe, val, "m").top1 == pytest.approx(score, abs=0.5 + 1e-9)
    difference_NL = probe.logits(rows.train_NC).softmax(1).numpy() - best.predict_proba(x_NC)
    assert np.abs(difference_NL).max() < 2e-3  # both end at a gradient of 1e-4
    other = fitted(3 * study.best_params["C"], slice(None)).predict_proba(x_NC)
    assert np.abs(best.predict_proba(x_NC) - other).max() > 5e-3  # another C is told apart


def test_a_missing_optuna_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RuntimeError, match=r"needs Optuna; pip install -e '.\[eval\]'"):
        fit_optuna(sets(planted(40, 10, 4, 2, gap=4))[0], seed=0, device=CPU)


def test_heads_are_those_of_torch_s_sgd() -> None:
    """Three pairs of rate and decay at once, and alone; batches of 32, the last of 8."""
    rows = planted(200, 1, 6, 4, gap=3)
    pairs = [(0.5, 0.0), (5.0, 1e-2), (0.05, 1.0)]
    schedule = Schedule(epochs=3, batch=32, rows=200)
    rate_P, decay_P = torch.tensor(pairs).T
    heads = Heads(7, 4, rate_P=rate_P, decay_P=decay_P)
    layers = [torch.nn.Linear(6, 4) for _ in pairs]
    for layer in layers:
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimisers = [
        torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
        for layer, (rate, decay) in zip(layers, pairs, strict=True)
    ]
    cosines = [torch.optim.lr_scheduler.CosineAnnealingLR(o, schedule.steps) for o in optimisers]
    step = 0
    for epoch in range(3):
        batches = schedule.batches(torch.arange(200), epoch, 1)
        assert torch.cat(batches).sort().values.tolist() == list(range(200))
        for row_B in batches:
            x_BC, class_B = rows.train_NC[row_B], rows.train_label_N[row_B]
            heads.step(raw(x_BC), class_B, factor=schedule.factor(step))
            for layer, optimiser, cosine in zip(layers, optimisers, cosines, strict=True):
                optimiser.zero_grad()
                cross_entropy(layer(x_BC), class_B).backward()
                optimiser.step(), cosine.step()
            step += 1
    for p, layer in enumerate(layers):
        expected_LD = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        assert torch.allclose(heads.weight_PLD[p], expected_LD, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_finite_ends_alone_and_one_that_spares_rows_ignores_them() -> None:
    rows = planted(64, 1, 6, 3, gap=3)
    x_ND, class_N, held_N = raw(rows.train_NC), rows.train_label_N, torch.arange(64) % 4 == 0
    spares_P = torch.tensor([False, True, False])
    rate_P = torch.tensor([0.1, 0.1, 1e38])
    heads = Heads(7, 3, rate_P=rate_P, decay_P=torch.zeros(3), spares_P=spares_P)
    whole, part = (Heads(7, 3, rate_P=rate_P[:1], decay_P=torch.zeros(1)) for _ in range(2))
    for _ in range(5):
        heads.step(x_ND, class_N, factor=1, held_B=held_N)
        whole.step(x_ND, class_N, factor=1)
        part.step(x_ND[~held_N], class_N[~held_N], factor=1)
    assert heads.finite_P.tolist() == [True, True, False]
    assert torch.allclose(heads.weight_PLD[:1], whole.weight_PLD, atol=1e-6)
    assert torch.allclose(heads.weight_PLD[1:2], part.weight_PLD, atol=1e-6)
    assert not torch.allclose(whole.weight_PLD, part.weight_PLD, atol=1e-4)


@pytest.mark.parametrize("fit", [fit_sgd, fit_rates])
def test_sgd_finds_planted_classes(fit: Any) -> None:
    train, val = sets(planted(400, 200, 32, 4, gap=12))
    train.cls["m"].mul_(8), val.cls["m"].mul_(8)
    found = accuracy(fit(train, seed=0, device=CPU)["m"], val, "m")
    assert found.top1 > 97 and found.per_class > 97
    train, val = sets(planted(400, 400, 32, 4, gap=0))
    by_chance = accuracy(fit(train, seed=0, device=CPU)["m"], val, "m")
    assert 15 < by_chance.top1 < 35


@pytest.mark.gpu
@pytest.mark.parametrize("fit", [fit_optuna, fit_sgd, fit_rates])
def test_a_gpu_finds_the_accuracies_of_the_cpu(fit: Any) -> None:
    train, val = sets(of_equal_scale(planted(600, 400, 32, 4, gap=2)))
    points = [
        accuracy(fit(train, seed=0, device=torch.device(name))["m"], val, "m").top1
        for name in ("cpu", "cuda")
    ]
    assert points[0] == pytest.approx(points[1], abs=1)


def test_accuracy_per_class_is_the_mean_over_tested_classes() -> None:
    """A probe of the classes 1 and 4 on rows of 1, 4 and 7, which it does not know."""
    probe = Probe(torch.tensor([[1.0, -1], [0, 0]]), torch.tensor([1, 4]), raw, "")
    x_NC = torch.tensor([[2.0], [3], [-1], [1], [-1]])
    tested = FeatureSet({"m": x_NC}, torch.arange(5), torch.tensor([1, 1, 1, 4, 7]))
    assert accuracy(probe, tested, "m") == pytest.approx((40, 100 * (2 / 3 + 0 + 0) / 3))


@dataclass
class Shifted(MemoryImages):
    """Rows that are shifted in augmented views, by the number of the epoch."""

    def augmented(self, sizes: Sequence[int], *, epoch: int, seed: int) -> Iterator[EvalBatch]:
        """Views of the rows."""
        self.epochs = [*getattr(self, "epochs", []), epoch]
        for batch in self.batches(sizes):
            yield batch._replace(images={size: x + epoch for size, x in batch.images.items()})


def patches_model() -> Model:
    """A model whose CLS features say nothing; its patch tokens are the rows and their negative."""

    def encode(row_BC: Tensor, _: object) -> Outputs:
        patch_BNC = torch.stack([2 * row_BC, torch.zeros_like(row_BC)], 1)
        return Outputs(torch.zeros_like(row_BC), patch_BNC)

    return Model("patches", 1, frozenset({"cls", "patch"}), encode)


def test_augmented_views_and_mean_patches_are_trained_on() -> None:
    rows = of_equal_scale(planted(400, 100, 16, 2, gap=20))
    rows.train_label_N[3] = -1
    train, val = (Shifted(*part) for part in (rows[:2], rows[2:]))
    models = [columns_model("cls"), patches_model(), columns_model("one", slice(1))]
    given = {"train": train, "val": val}
    found = scores_of("linear", models, given, Eval(protocol="dinov2"))
    assert train.epochs == list(range(10)) and not hasattr(val, "epochs")
    assert [score.name for score in found[:2]] == ["linear", "linear per class"]
    values = {score.model: score.value for score in found if score.name == "linear"}
    assert values["cls"] > 95 and values["patches"] > 95 > values["one"]
    protocol = {score.model: score.protocol for score in found if score.name == "linear"}
    rule = "SGD 10 epochs, batch 32, 13 rates in [1e-05, 0.1] x batch/256 on 20% held out"
    used = "399/100 images 1 px"
    assert protocol["cls"] == f"linear {rule}, augmented views, CLS {used}"
    assert "augmented views, CLS and CLS+mean patches" in protocol["patches"]
    plain = {"train": MemoryImages(*rows[:2]), "val": MemoryImages(*rows[2:])}
    (score, _) = scores_of("linear", models[:1], plain, Eval(protocol="dinov2"))
    assert score.value > 95 and "stored features, CLS " in score.protocol
    assert len(RATES) == 13


def test_fit_probe_follows_the_protocol_and_has_logits() -> None:
    rows = of_equal_scale(planted(120, 40, 8, 3, gap=20))
    label_N = rows.train_label_N * 10
    label_N[5] = -1
    train, val = sets(rows._replace(train_label_N=label_N))
    rules = {"quick": "softmax L2 C=0.0001,", "radio": "SGD 100 epochs", "dinov2": "SGD 10 epochs"}
    for protocol, begins in rules.items():
        data = EvalData({}, options=Eval(protocol=protocol), seed=0, device=CPU)
        probe = fit_probes(train, data)["m"]
        assert probe.rule.startswith(begins) and probe.classes.tolist() == [0, 10, 20]
        logit_RL = probe.logits(val.cls["m"])
        assert logit_RL.shape == (40, 3) and logit_RL.dtype == torch.float32
        right = probe.classes[logit_RL.argmax(1)] == 10 * val.label_N
        assert right.float().mean() > 0.9
        assert probe.logits(val.cls["m"][:0]).shape == (0, 3)
    assert rule_for("optuna", LARGE) == "optuna" and rule_for("optuna", LARGE + 1) == "sgd"
    assert rule_for("grid", LARGE + 1) == "grid"


def test_sampled_images_show_other_crops_in_each_epoch(tmp_path: Path) -> None:
    source = scan(str(folder(tmp_path / "a", 6)))
    images = SampledImages(source, Config(eval=Eval(batch=4)), labelled=False)
    assert isinstance(images, AugmentedImages)

    def shown(epoch: int, seed: int = 0) -> tuple[Tensor, list[int]]:
        batches = list(images.augmented((32, 16), epoch=epoch, seed=seed))
        assert all(batch.images[16].shape[-1] == 16 for batch in batches)
        places = [int(place) for batch in batches for place in batch.place_B]
        return torch.cat([batch.images[32] for batch in batches]), places

    first, places = shown(0)
    assert places == list(range(len(images))) and torch.equal(first, shown(0)[0])
    assert shown(1)[1] == places and not torch.equal(first, shown(1)[0])
    assert not torch.equal(first, shown(0, seed=1)[0])
