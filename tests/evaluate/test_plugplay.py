"""Teachers' classifiers on predicted tokens: known answers, classes by WordNet ids, refusals."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from memory_sets import scores_of
from projected_sets import TokenClassifier, projecting, token_set
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn import functional as F

from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.features import Model
from unic_ds.tokens import Tokens

CLS, PATCH = frozenset({"cls"}), frozenset({"patch"})


def measured(
    models: Sequence[Model], names: Sequence[str], label_N: Tensor, **classifiers: Any
) -> list[Score]:
    """Scores on tokens that have the label's channel."""
    images = token_set(label_N, names)
    sets = {"train": images, "val": images}
    return scores_of("plugplay", models, sets, classifiers=classifiers)


def test_known_answers() -> None:
    """CLS tokens are all right; patch tokens have the next channel, so all wrong."""
    models = [projecting("student", ["vit", "gap"]), projecting("vit", ["vit"])]
    classifiers = {"vit": TokenClassifier(3, CLS), "gap": TokenClassifier(3, PATCH)}
    found = measured(models, "abc", torch.arange(6) % 3, **classifiers)
    assert [score[:3] for score in found] == [
        ("student", "plugplay vit", 100.0),
        ("student", "plugplay gap", 0.0),
        ("vit", "plugplay vit", 100.0),
    ]
    assert found[0].protocol == "plugplay vit top-1 of 3 classes, 6 images 1 px"


def test_a_model_without_the_tokens_that_a_classifier_reads_is_left_out() -> None:
    models = [projecting("student", ["vit", "gap"], patches=False)]
    classifiers = {"vit": TokenClassifier(3, CLS), "gap": TokenClassifier(3, PATCH)}
    found = measured(models, "abc", torch.arange(6) % 3, **classifiers)
    assert [score.name for score in found] == ["plugplay vit"]


class Placed:
    """A classifier of ImageNet whose logits are one-hot at given places (`Classifier`)."""

    classes, kinds = 1000, CLS

    def __init__(self, place_L: list[int]):
        self.place_L = torch.tensor(place_L)

    def logits(self, tokens: Tokens) -> Tensor:
        """Logits at the place of the token's channel, and larger ones of a class not asked for."""
        place_B = self.place_L[tokens.cls_BC.argmax(1)]
        logit_BL = F.one_hot(place_B, self.classes).float()
        logit_BL[:, 5] = 9
        return logit_BL


def test_some_classes_of_imagenet_are_found_by_wordnet_ids() -> None:
    """Folders sort in another order than the classifier's, and the other classes do not vote."""
    ids = ImageNetInfo("imagenet-1k").label_names()
    names = [ids[900], ids[3], ids[77]]
    model = [projecting("student", ["vit"])]
    (found,) = measured(model, names, torch.arange(6) % 3, vit=Placed([900, 3, 77]))
    assert found.value == 100 and "top-1 of 3 of 1000 classes" in found.protocol
    (wrong,) = measured(model, names, torch.arange(6) % 3, vit=Placed([900, 77, 77]))
    assert wrong.value == pytest.approx(100 * 2 / 3)


def test_numbered_classes_are_found_by_their_numbers() -> None:
    """Folders sort as text, 10 before 2, and may be some of the classes."""
    model = [projecting("student", ["vit"])]
    (found,) = measured(model, ["10", "2", "900"], torch.arange(6) % 3, vit=Placed([10, 2, 900]))
    assert found.value == 100 and "top-1 of 3 of 1000 classes" in found.protocol


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("ant", "bee"), "'memory' has 2 classes, vit's classifier 1000; name the folders"),
        (
            ("7", "1000"),
            "has the class 1000, but the 1000 classes of vit's classifier",
        ),
        (("n99999999", "n01440764"), "n99999999, which is none of the 1000 classes of vit's"),
    ],
)
def test_other_classes_are_refused(names: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        measured([projecting("m", ["vit"])], names, torch.arange(2), vit=Placed([0, 1]))


def test_a_run_without_a_classifier_is_left_out(capsys: Any) -> None:
    assert measured([projecting("m", ["vit"])], "ab", torch.arange(2)) == []
    assert "not evaluated by plugplay, which needs a teacher" in capsys.readouterr().out
