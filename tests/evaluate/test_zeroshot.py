"""Zero-shot classification: known answers, names and prompts, the same on any number of ranks."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from forked import Forked
from memory_sets import scores_of
from projected_sets import WIDTH, WordTower, projecting, scores, token_set
from runs import SUPPORT, run
from timm.data import ImageNetInfo
from torch.nn import functional as F

from unic_ds.config import Eval
from unic_ds.evaluate.comparison import Score
from unic_ds.evaluate.zeroshot import class_names, classifier_of, templates
from unic_ds.harness.text_towers import ClipText

NAMES = ("ant_bear", "bee-eater", "cat")
WORDS = {"bear": torch.eye(WIDTH)[0], "eater": torch.eye(WIDTH)[1], "cat": torch.eye(WIDTH)[2]}


def measured(label_N: torch.Tensor, names: tuple[str, ...] = NAMES, **more: Any) -> list[Score]:
    """Scores of a student and its teacher; the labels are those of the tokens."""
    images = token_set(torch.arange(len(label_N)) % len(names), names)
    images.label_N = label_N
    models = [projecting("student", ["clip", "dino"]), projecting("clip", ["clip"])]
    towers = more.pop("text_towers", {"clip": WordTower(WORDS, [])})
    sets = {"train": images, "val": images}
    return scores_of("zeroshot", models, sets, text_towers=towers, **more)


def test_known_answers() -> None:
    """All right, two of three right, one without a class; student and teacher in one row."""
    every = measured(torch.arange(9) % 3)
    assert [score[:3] for score in every] == [
        ("student", "zeroshot clip", 100.0),
        ("clip", "zeroshot clip", 100.0),
    ]
    assert every[0].protocol == (
        "zeroshot clip top-1, classes by folder, prompts open_clip's 80, cosine, 3 classes"
        " 9 images 1 px"
    )
    first, _ = measured(torch.tensor([0, 1, 0, -1]))
    assert first.value == pytest.approx(100 * 2 / 3)
    assert "3 images" in first.protocol


def test_the_five_nearest_of_many_classes() -> None:
    """Of classes 0 to 11 the tokens know 8: the right one is among five, second or not at all."""
    names = tuple(f"class{i}" for i in range(12))
    words = {
        name: F.one_hot(torch.tensor(i % WIDTH), WIDTH).float() for i, name in enumerate(names)
    }
    words |= {f"class{i}": words[f"class{i}"] + 2 * words["class7"] for i in range(8, 12)}
    images = token_set(torch.arange(8), names)
    images.label_N = torch.tensor([8, 1, 2, 3, 4, 5, 6, 7])
    sets = {"train": images, "val": images}
    tower = {"clip": WordTower(words, [])}
    found = scores_of("zeroshot", [projecting("m", ["clip"])], sets, text_towers=tower)
    assert {s.name: s.value for s in found} == {"zeroshot clip": 87.5, "zeroshot clip top-5": 100.0}


def test_the_classifier_is_open_clips() -> None:
    """Means over prompts of unit embeddings, with class names that hold braces."""
    torch.manual_seed(0)
    cfg = open_clip.get_model_config("ViT-B-32")
    small = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    model = open_clip.CLIP(**cfg | {"embed_dim": 16, "text_cfg": small, "vision_cfg": vision})
    tokenize = open_clip.SimpleTokenizer(context_length=24)
    names = ["tench", "great white shark", "sign {0.__class__}"]
    ours_LE = classifier_of(
        ClipText(model.eval(), tokenize, lambda x: x, torch.device("cpu")),
        names,
        templates(Eval()).lines,
    )
    theirs_EL = open_clip.build_zero_shot_classifier(
        model, tokenize, names, open_clip.OPENAI_IMAGENET_TEMPLATES
    )
    torch.testing.assert_close(ours_LE.T, theirs_EL, rtol=1e-5, atol=1e-6)


def test_names_of_classes(tmp_path: Path) -> None:
    """Folders with blanks, ImageNet's by WordNet ids (all or some), or lines of a file."""
    images = token_set(torch.arange(3), NAMES)
    assert class_names(images, Eval()).lines == ("ant bear", "bee eater", "cat")
    file = tmp_path / "names.txt"
    file.write_text("Ant bear\nBee eater\n\nCat\n")
    named = class_names(images, Eval(class_names=str(file)))
    assert named.lines == ("Ant bear", "Bee eater", "Cat")
    assert named.origin.startswith("3 of names.txt ")
    ids = ImageNetInfo("imagenet-1k").label_names()
    all_of_it = class_names(token_set(torch.arange(3), ids), Eval(class_names="imagenet"))
    assert all_of_it.lines == tuple(open_clip.IMAGENET_CLASSNAMES)
    some = class_names(token_set(torch.arange(2), [ids[2], ids[0]]), Eval(class_names="imagenet"))
    assert some.lines == ("great white shark", "tench")


def test_numbered_folders_have_the_names_of_their_numbers(tmp_path: Path) -> None:
    """Folders sort as text: 10 stands before 2."""
    names = sorted(map(str, range(11)))
    images = token_set(torch.arange(8), names)
    file = tmp_path / "names.txt"
    file.write_text("\n".join("abcdefghijk"))
    assert class_names(images, Eval(class_names=str(file))).lines == tuple("abkcdefghij")
    found = class_names(images, Eval(class_names="imagenet")).lines
    assert found == tuple(open_clip.IMAGENET_CLASSNAMES[int(name)] for name in names)


PROMPTS = "a stamp of a {}.\nthe {}, {}\n"


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS)
    tower = WordTower(WORDS, [])
    found = measured(
        torch.arange(3), options=Eval(templates=str(file)), text_towers={"clip": tower}
    )
    assert {"a stamp of a ant bear.", "the bee eater, bee eater"} <= set(tower.seen)
    assert "prompts 2 of prompts.txt " in found[0].protocol


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (NAMES, {"class_names": "two"}, "has 2 names in .*two.*, but 'memory' has 3 classes"),
        (NAMES, {"class_names": "missing"}, "missing' cannot be read"),
        (NAMES, {"class_names": "imagenet"}, "'ant_bear', which is no WordNet id"),
        (("0", "2"), {"class_names": "two"}, "class folder 2, but eval.class_names has 2 names"),
        (("0", "1000"), {"class_names": "imagenet"}, "class folder 1000, but .* has 1000 names"),
        (NAMES, {"templates": "two"}, r"a line without \{\} in .*: 'one'"),
        (NAMES, {"templates": "empty"}, "empty' has no lines"),
        (("n01440764", "cat", "dog"), {}, "n01440764, whose name says nothing"),
    ],
)
def test_names_and_prompts_that_do_not_fit(
    tmp_path: Path, names: tuple[str, ...], options: dict[str, str], says: str
) -> None:
    (tmp_path / "two").write_text("one\ntwo\n")
    (tmp_path / "empty").write_text("\n")
    given = {k: v if v == "imagenet" else str(tmp_path / v) for k, v in options.items()}
    with pytest.raises(RuntimeError, match=says):
        measured(torch.arange(3), names, options=Eval(**given))


def test_models_without_a_text_space_have_no_row(capsys: Any) -> None:
    """A model that predicts no CLS token of the teacher, and a run without a text tower."""
    images = token_set(torch.arange(3), NAMES)
    sets = {"train": images, "val": images}
    tower = {"clip": WordTower(WORDS, [])}
    assert scores_of("zeroshot", [projecting("m", ["dino"])], sets, text_towers=tower) == []
    assert measured(torch.arange(3), text_towers={}) == []
    assert "needs a teacher with a text tower" in capsys.readouterr().out


def test_what_cannot_be_measured_is_one_sentence() -> None:
    with pytest.raises(RuntimeError, match="memory has no image with a class"):
        measured(torch.tensor([-1, -1]))
    images = token_set(torch.arange(3), NAMES)
    images.value_NC[1] = torch.nan
    sets = {"train": images, "val": images}
    tower = {"clip": WordTower(WORDS, [])}
    with pytest.raises(RuntimeError, match="predictions of 'clip' by 'm' are NaN"):
        scores_of("zeroshot", [projecting("m", ["clip"])], sets, text_towers=tower)


@pytest.mark.dist
def test_two_ranks_find_the_same_scores(tmp_path: Path) -> None:
    """Zero-shot and plug-and-play: images, one without a class, and classes are dealt."""
    run(Forked(2, [str(SUPPORT / "projected_sets.py"), str(tmp_path / "scores")]))
    first, second = json.loads((tmp_path / "scores").read_text())
    assert first == second == [list(score) for score in scores()]
    assert [score[1] for score in first] == ["zeroshot clip", "zeroshot clip", "plugplay vit"]
    assert 40 < first[0][2] < 100 and first[2][2] < 40
