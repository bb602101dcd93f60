"""The model card: metadata by huggingface_hub's own parsers, text by a Markdown parser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from runs import DEMONSTRATION

from unic_ds import config
from unic_ds.config import overrides, recipes
from unic_ds.evaluate import comparison
from unic_ds.evaluate.comparison import Comparison, Score
from unic_ds.teachers import licences
from unic_ds.weights import card, card_facts
from unic_ds.weights.card_facts import TeacherRow

SECRET = "/secret place/alice"
STUDENT = config.Student(model="test_vit", size=32, mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25))
CFG = config.Config(
    recipe="small",
    teachers=(
        config.Teacher(name="effnet", source=f"file:{SECRET}/e.pth#arch=tf_efficientnet_lite0"),
        config.Teacher(name="dinov2", source="timm:vit_small_patch14_dinov2.lvd142m"),
        config.Teacher(name="clip", source="open_clip:ViT-B-32/laion2b_s34b_b79k"),
    ),
    student=STUDENT,
    data=config.Data(train=f"{SECRET}/photos/=0.5,{SECRET}/more", val=f"{SECRET}/held_out/"),
    eval=config.Eval(data=f"zeroshot={SECRET}/cars", class_names=f"{SECRET}/names.txt"),
    cache=f"{SECRET}/cache",
)
HASH = "0123456789abcdef" * 4
MANIFEST = {
    "effnet": {"licence": "Apache-2.0", "content": HASH, "sha256": "f" * 64},
    "dinov2": {"licence": "apache-2.0", "sha256": HASH},
    "clip": {"licence": ""},
}
HOSTILE = (
    "x`|<script>alert(1)</script> [y](http://z) <b>\n# All is allowed\n---\n```\n\x1b[2J\u202e"
)


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    """A tiny ViT."""
    return timm.create_model("test_vit", img_size=32, num_classes=0)


def measured(*scores: Score) -> Comparison:
    """Scores of a student and a teacher."""
    return Comparison.of(scores, {"dinov2": "teacher", "student after": "student"})


def render(text: str) -> str:
    """A card's body as HTML, with raw HTML as a browser would get it."""
    body = re.sub(r"^---\n.*?\n---\n", "", text, count=1, flags=re.S)
    return MarkdownIt("commonmark").enable("table").render(body)


def test_text_and_metadata(encoder: torch.nn.Module, tmp_path: Path) -> None:
    text = card.render(encoder, CFG, MANIFEST)
    assert "| effnet | `file:e.pth#arch=tf_efficientnet_lite0` | Apache-2.0 | permissive |" in text
    assert "| clip | `open_clip:ViT-B-32/laion2b_s34b_b79k` | unknown | unknown | - |" in text
    assert "0.4, 0.5, 0.6" in text and "32 x 32 px" in text and "2 x 2 grid" in text
    assert "has not been evaluated" in text
    assert "secret" not in text and "alice" not in text
    assert "Images: photos=0.5,more, validated on held_out." in text

    (tmp_path / "README.md").write_text(text)
    found = metadata_load(tmp_path / "README.md")
    assert found["library_name"] == "timm"
    assert found["pipeline_tag"] == "image-feature-extraction"
    assert found["license"] == "unknown"
    assert found["base_model"] == [
        "timm/vit_small_patch14_dinov2.lvd142m",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ]
    assert found["base_model_relation"] == "finetune"
    assert "datasets" not in found and "model-index" not in found and "model_name" not in found
    (effnet, dinov2, clip) = found["unic_ds"]["teachers"]
    assert effnet["hash"] == dinov2["hash"] == HASH and clip["licence"] == "unknown"


def test_a_manifest_alone_names_sources() -> None:
    """Facts of a run whose settings are not at hand, as of another format's card."""
    manifest = {
        "effnet": {"source": f"file:{SECRET}/e.pth#arch=tf_efficientnet_lite0", "licence": "MIT"},
        "dinov2": {"source": "timm:vit_small_patch14_dinov2.lvd142m", "licence": "apache-2.0"},
        "odd": {"source": f"{SECRET}/x", "licence": "mit"},
    }
    rows = card_facts.teacher_rows(config.Config(student=STUDENT), manifest)
    assert [row.source for row in rows] == [
        "file:e.pth#arch=tf_efficientnet_lite0",
        "timm:vit_small_patch14_dinov2.lvd142m",
        "x",
    ]
    data = card_facts.metadata(rows, library="transformers").to_dict()
    assert data["library_name"] == "transformers" and data["tags"][0] == "transformers"
    assert data["base_model"] == ["timm/vit_small_patch14_dinov2.lvd142m"]


def test_the_settings_on_a_card_are_a_recipe(encoder: torch.nn.Module, tmp_path: Path) -> None:
    text = card.render(encoder, CFG, MANIFEST)
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.S | re.M)
    (tmp_path / "settings.yaml").write_text(block)
    read = recipes.read(tmp_path / "settings.yaml")
    assert read.student == CFG.student and read.optim == CFG.optim
    assert [row.source for row in read.teachers][1:] == [row.source for row in CFG.teachers][1:]
    assert read.cache == "cache" and read.eval.class_names == "names.txt"
    changed = (
        overrides.flatten(yaml.safe_load(block)).items()
        - overrides.flatten(overrides.to_dict(CFG)).items()
    )
    paths = card_facts.PATHS | {"teachers.effnet.source"}
    assert {name for name, _ in changed} <= paths


def test_hostile_text_is_shown_as_it_is(encoder: torch.nn.Module, tmp_path: Path) -> None:
    teachers = (
        config.Teacher(name="t", source=f"file:/a/{HOSTILE}.pth#arch=vit_tiny_patch16_224"),
        config.Teacher(name="u", source="timm:x```\n</details><script>"),
    )
    cfg = config.Config(recipe="r", teachers=teachers, student=STUDENT, stages="")
    cfg = overrides.from_dict(
        overrides.to_dict(cfg) | {"data": {"train": f"/a/{HOSTILE.replace(',', '')}"}}
    )
    found = Comparison.of(
        [Score(HOSTILE, HOSTILE, 1.0, HOSTILE), Score("t", HOSTILE, 2.0, HOSTILE)],
        {HOSTILE: "student", "t": "teacher"},
    )
    manifest = {name: {"licence": HOSTILE, "sha256": HOSTILE} for name in ("t", "u", HOSTILE)}
    text = card.render(encoder, cfg, manifest, f"from {HOSTILE}", licence=HOSTILE, comparison=found)
    assert "\x1b" not in text and "\u202e" not in text
    html = render(text)
    assert re.findall(r"<(script|b|img)\b", html) == []
    assert re.findall(r'href="([^"]*)"', html) == []
    assert re.findall(r"<h1>", html) == ["<h1>"] and "All is allowed</h1>" not in html
    assert html.count("<table>") == 4 and html.count("</details>") == 1
    rows = [row for row in re.findall(r"<tr>(.*?)</tr>", html, re.S) if "All is allowed" in row]
    assert {len(re.findall("<t[dh]>", row)) for row in rows} == {5, 4}  # teachers, results
    (tmp_path / "README.md").write_text(text)
    data = metadata_load(tmp_path / "README.md")
    assert [row["name"] for row in data["unic_ds"]["teachers"]][:2] == ["t", "u"]
    assert ModelCard(text).data.license == "unknown"


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Apache-2.0", "permissive"),
        ("the Apache License, Version 2.0", "permissive"),
        ("MIT", "permissive"),
        ("The MIT License", "permissive"),
        ("BSD 3-Clause License", "permissive"),
        ("cc-by-4.0", "permissive"),
        ("cc-by-nc-4.0", "non-commercial"),
        ("CC BY-NC-SA 4.0", "non-commercial"),
        ("nsclv1", "non-commercial"),
        ("MIT, but for non-commercial use", "non-commercial"),
        ("apache-2.0 AND cc-by-nc-4.0", "non-commercial"),
        ("fair-noncommercial-research-license", "research only"),
        ("apple-amlr", "research only"),
        ("for research purposes", "research only"),
        ("dinov3-license", "custom"),
        ("DINOv3 License", "custom"),
        ("llama3.1", "custom"),
        ("gemma", "custom"),
        ("NVIDIA Open Model License", "custom"),
        ("openrail", "custom"),
        ("GPL-3.0-only", "custom"),
        ("MIT | all is allowed", "unknown"),
        ("mit-ish", "unknown"),
        ("unknown", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_terms_of_licences(text: str | None, terms: str) -> None:
    assert licences.licence_class(text) == terms


def test_licences_of_timm_s_weights_are_known() -> None:
    """Names without a text of their own are allowed to be unknown, no other."""
    known = {(timm.get_pretrained_cfg(n).license or "") for n in timm.list_pretrained()}
    assert len(known) > 8
    unknown = {name for name in known if licences.licence_class(name) == "unknown"}
    assert unknown <= {"", "unknown"}


def row(name: str, licence: str) -> TeacherRow:
    """A teacher with a licence."""
    return TeacherRow(name, "timm:x", licence, "", "")


@pytest.mark.parametrize(
    ("given", "keys", "first"),
    [
        (["mit", "MIT"], {"license": "mit"}, "may be used for any purpose"),
        (
            ["mit", "apache-2.0"],
            {"license": "other", "license_name": "apache-2.0-and-mit"},
            "may be used for any purpose",
        ),
        (["mit", "cc-by-nc-4.0"], {"license": "cc-by-nc-4.0"}, "not for commercial use"),
        (["apple-amlr"], {"license": "apple-amlr"}, "for research only"),
        (
            ["apache-2.0", "dinov3-license"],
            {
                "license": "other",
                "license_name": "dinov3-license",
                "license_link": f"{licences.META}/dinov3-license/",
            },
            "conditions of their own",
        ),
        (
            ["cc-by-nc-4.0", ""],
            {"license": "other", "license_name": "cc-by-nc-4.0-and-unknown"},
            "unknown licence",
        ),
        (["mit", ""], {"license": "unknown"}, "unknown licence"),
        ([], {"license": "unknown"}, "unknown licence"),
    ],
)
def test_the_strictest_licence_counts(given: list[str], keys: dict[str, str], first: str) -> None:
    rows = [row(f"t{i}", licence) for i, licence in enumerate(given)]
    assert card_facts.licence_keys(rows) == keys
    lines = list(card.warning_lines(rows))
    assert first in lines[0]
    strict = {licences.licence_class(text) for text in given} - {"permissive"}
    assert len(lines) == max(1, len(strict))


def test_the_weights_own_licence_is_no_teacher_s(encoder: torch.nn.Module) -> None:
    own = {"licence": "cc-by-nc-4.0"}
    text = card.render(encoder, config.Config(student=STUDENT), {"dinov2": own}, "found", **own)
    said = "The licence of these weights (cc-by-nc-4.0) forbids commercial use."
    assert said in text and f"({own['licence']}) forbids commercial use; whether it" in text
    data = ModelCard(text).data.to_dict()
    assert data["license"] == data["unic_ds"]["licence"] == "cc-by-nc-4.0"
    assert [row["name"] for row in data["unic_ds"]["teachers"]] == ["dinov2"]
    assert "licence" not in card_facts.metadata([row("t", "mit")])["unic_ds"]

    (line,) = card.warning_lines([row("t", "mit")], licence="gemma")
    assert "conditions for whoever uses or passes them on. Read it" in line
    own_line, of_teachers = card.warning_lines([row("t", "")], licence="gemma")
    assert "these weights (gemma)" in own_line and "licence of t " in of_teachers
    assert card_facts.licence_keys([row("t", "mit")], "gemma") == {"license": "gemma"}


def test_the_warning_stands_above_the_code(encoder: torch.nn.Module) -> None:
    manifest = MANIFEST | {"dinov2": {"licence": "cc-by-nc-4.0"}}
    text = card.render(encoder, CFG, manifest)
    before, _, _ = text.partition("timm.create_model")
    heading = before.index("## Loading")
    assert heading < before.index("unknown licence") < before.index("not for commercial use")
    assert "dinov2 (cc-by-nc-4.0)" in before


def test_results_in_metadata(encoder: torch.nn.Module, tmp_path: Path) -> None:
    found = measured(
        Score("student after", "knn", 61.25, "knn k=10 cosine 32 px"),
        Score("dinov2", "knn", 70.0, "knn k=10 cosine 28 px"),
        Score("student after", "zeroshot", 33.0, "zeroshot top-1"),
        Score("student after", "retrieval mAP", math.nan, "retrieval"),
        Score("student after", "depth RMSE", 0.4, "depth", unit="m", better="lower"),
        Score("student after", "rankme", 88.0, "rankme", unit="", better=""),
    )
    text = card.render(encoder, CFG, MANIFEST, comparison=found)
    assert "| kNN % | 70.0 | 61.2 | -8.8 (-12.5 %) |" in text
    assert "- kNN %: knn k=10 cosine 32 px" in text and "k=10 cosine 28 px" not in text
    results = ModelCard(text).data.eval_results
    assert [(r.task_type, r.metric_type, r.metric_value, r.dataset_name) for r in results] == [
        ("image-classification", "accuracy", 61.25, "held_out"),
        ("zero-shot-image-classification", "accuracy", 33.0, "cars"),
        ("depth-estimation", "rmse", 0.4, "held_out"),
    ]
    assert results[0].metric_args == {"protocol": "knn k=10 cosine 32 px"}
    (tmp_path / "README.md").write_text(text)
    assert metadata_load(tmp_path / "README.md")["model-index"][0]["name"] == "test_vit-small"


@DEMONSTRATION
def test_a_finished_run_s_card(finished: tuple[Path, str]) -> None:
    out, _ = finished
    text = (out / "student" / "README.md").read_text()
    results = ModelCard(text).data.eval_results
    table = json.loads((out / "results.json").read_text())["student after"]
    assert {r.metric_name: r.metric_value for r in results} == {
        f"{name} %": pytest.approx(value, abs=1e-3) for name, value in table.items()
    }
    assert "it was not trained" in text  # the final norm, read from the weights
    assert "effnet (Apache-2.0), dinov2 (MIT) may be used for any purpose" in text
    protocols = {p for r in comparison.read(out).rows for p in (r.protocols["student after"],)}
    assert all(protocol in text for protocol in protocols)
    assert str(Path.home()) not in text and str(out) not in text and "/quickstart/" not in text
    assert render(text).count("<table>") == 4
