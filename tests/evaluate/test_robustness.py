"""Robustness: one probe on several sets, fewer classes, and ImageNet's reassessed labels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from memory_sets import MemoryImages, columns_model, scores_of
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor
from torch.nn.functional import one_hot

from unic_ds.evaluate.features import FeatureSet
from unic_ds.evaluate.robustness import matched, real_labels, really_right, synsets

SYNSETS = tuple(ImageNetInfo().label_names())
INFO = Path(str(__import__("timm.data").data.__file__)).with_name("_info")


def images(value_NC: Tensor, label_N: list[int], classes: str) -> MemoryImages:
    """A set whose classes are letters."""
    return MemoryImages(value_NC, torch.tensor(label_N), tuple(classes))


def test_a_set_of_fewer_classes_is_predicted_among_these() -> None:
    """The third row of the shifted sets looks like class b."""
    label = [0, 1, 2, 3] * 10
    train = images(torch.eye(4)[label], label, "abcd")
    row_NC = torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 9.0], [0, 3.0, 0, 2.0]])
    sets = {
        "train": train,
        "val": train,
        "all": images(row_NC, [0, 3, 3], "abcd"),
        "few": images(row_NC, [1, 0, 0], "da"),  # its own numbers of the classes
    }
    scores = scores_of("robustness", [columns_model("m"), columns_model("c", slice(1))], sets)
    value = {(s.model, s.name): s.value for s in scores}
    assert value["m", "robustness val"] == value["m", "robustness few"] == 100
    assert value["m", "robustness all"] == pytest.approx(200 / 3)
    assert value["c", "robustness val"] == 50  # it tells a from the others
    (few,) = (s for s in scores if (s.model, s.name) == ("m", "robustness few"))
    assert few.protocol.startswith("linear softmax L2 ")
    assert few.protocol.endswith(", among 2 of 4 classes 40/3 images 1 px")
    assert len(scores) == 6


@pytest.mark.parametrize("folder, file", [("imagenet-a", "a"), ("ImageNet_R", "r")])
def test_published_subsets_have_timm_s_indices(folder: str, file: str) -> None:
    listed = synsets(f"imagenet_{file}_synsets.txt")
    train = MemoryImages(torch.zeros(0), torch.zeros(0), SYNSETS)
    some = MemoryImages(torch.zeros(0), torch.zeros(0), listed[5:])  # five folders are missing
    label_M, wanted_M = matched(folder, some, train)
    indices = [int(line) for line in (INFO / f"imagenet_{file}_indices.txt").read_text().split()]
    assert len(indices) == 200 and wanted_M.tolist() == sorted(indices)
    assert label_M.tolist() == [SYNSETS.index(name) for name in listed[5:]]
    assert len(matched("other", some, train)[1]) == 195


def test_real_labels_are_those_of_timm() -> None:
    """The first 3,000 images, each called by its first label or by any number."""
    names = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]
    oracle = RealLabelsImagenet(names, topk=(1,))
    found_N = torch.arange(3000) * 7 % 1000
    for place in range(0, 3000, 3):
        found_N[place] = next(iter(oracle.real_labels[names[place]]), 0)
    oracle.add_result(one_hot(found_N, 1000).float())
    train = MemoryImages(torch.zeros(0), torch.zeros(0), SYNSETS)
    files = [f"{SYNSETS[0]}/{name}" for name in names[:3000]]
    val = MemoryImages(torch.zeros(3000), torch.zeros(3000), SYNSETS, files=files)
    real = real_labels(val, train)
    assert real is not None
    features = FeatureSet({}, torch.arange(3000), torch.zeros(3000, dtype=torch.int64))
    right_R = really_right(found_N, features, real)
    assert 100 * float(right_R.double().mean()) == pytest.approx(oracle.get_accuracy(1))
    assert 2500 < len(right_R) < 3000  # some have no label
    files[7] = "other.JPEG"
    assert real_labels(val, train) is None
    assert real_labels(val, MemoryImages(torch.zeros(0), torch.zeros(0), SYNSETS[1:])) is None


def test_imagenet_s_validation_images_have_a_row_of_real_labels() -> None:
    """Images that the probe calls by a ReaL label that is not the first one's class."""
    real = RealLabelsImagenet([""] * 50_000).real_labels
    several = [(name, labels) for name, labels in real.items() if len(labels) > 1][:6]
    none = next(name for name, labels in real.items() if not labels)
    first = sorted({labels[0] for _, labels in several} | {labels[1] for _, labels in several})
    at = {label: i for i, label in enumerate(first)}
    train_label = first * 5
    train = MemoryImages(torch.eye(len(first)).repeat(5, 1), torch.tensor(train_label), SYNSETS)
    row_NC = torch.eye(len(first))[[at[labels[1]] for _, labels in several] + [0]]
    truth = [labels[0] for _, labels in several] + [first[0]]
    files = [f"any/{name}" for name, _ in several] + [f"any/{none}"]
    val = MemoryImages(row_NC, torch.tensor(truth), SYNSETS, files=files)
    scores = scores_of("robustness", [columns_model("m")], {"train": train, "val": val})
    value = {s.name: s.value for s in scores}
    assert value == {"robustness val": pytest.approx(100 / 7), "robustness val ReaL": 100}
    assert scores[1].protocol.endswith("any ReaL label counts 60/6 images 1 px")
