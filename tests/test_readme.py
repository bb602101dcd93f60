"""README and docs are true: their options exist, their code runs, their files and links exist."""

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from unic_ds import cli
from unic_ds.config import Eval, Teacher, job, overrides
from unic_ds.config.methods import METHODS
from unic_ds.config.recipes import RECIPES
from unic_ds.evaluate.eval_data import EvalData
from unic_ds.evaluate.features import FeatureSet, Model
from unic_ds.evaluate.registry import EVALUATORS
from unic_ds.losses.balance import BALANCERS
from unic_ds.losses.terms import TERMS
from unic_ds.teachers import sources
from unic_ds.teachers.teacher import load

ROOT = Path(__file__).resolve().parent.parent
DOCS = tuple(sorted(page.stem for page in (ROOT / "docs").glob("*.md")))
LAUNCHERS = {
    *("account", "chdir", "cpus", "nodes", "partition", "signal", "test", "time"),
    *("nnodes", "nproc", "node", "master", "mem", "max", "cpu"),
    *("hostfile", "no_ssh", "node_rank", "master_addr", "master_port", "launcher"),
}
"""Options of sbatch, of torchrun and of deepspeed, up to a hyphen."""
PIP = {"index", "format", "no", "find", "system"}
"""Options of pip and venv, up to a hyphen."""
NAMING_TESTS = [
    *("README.md", "CONTRIBUTING.md", "kernels/README.md", "Makefile"),
    *(f"docs/{name}.md" for name in DOCS),
]
TEXT = (ROOT / "README.md").read_text()
EXTENSIONS = {
    re.match(r"# (\w+)\.py", code)[1]: code
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.S)
}
"""Modules of docs/extend.md by name."""


@pytest.mark.parametrize("file", ["README.md", *(f"docs/{name}.md" for name in DOCS)])
def test_every_option_named_is_one(file):
    own = {f.name for module in cli.VERBS.values() for f in fields(module.VERB.options)}
    known = {*job.JOB_OPTIONS, *overrides.option_names(), "run", "logdir"}
    others = {"num_gpus", "json", "help", "seed", "views", "dtype", "hash"}
    if file in ("docs/slurm.md", "docs/reliability.md", "docs/evaluation.md"):
        others |= LAUNCHERS
    if file == "docs/evaluation.md":  # of torchrun and of composed_sets.py
        others |= {"nproc_per_node", "gpus", "small", "side", "train", "val", "no", "scale"}
    if file == "docs/install.md":
        others |= PIP
    others |= {"shard_mb", "max_side", "images", "rounds", "master_port", *own}
    others |= {"readers", "latency_ms", "only", "minutes", "op", "case", "check", "arch"}
    for name in re.findall(r"--([a-z_]+(?:\.[A-Za-z_]\w*)*)", (ROOT / file).read_text()):
        general = re.sub(r"^teachers\.\w+\.", "teachers.NAME.", name)
        assert general in known or name in others, name


def test_every_path_of_the_tree_exists():
    tree = re.search(r"^```\n(unic_ds/\n.*?)^```", TEXT, re.S | re.M)[1]
    names = re.findall(r"\b\w+(?:\.py\b|/)", tree)
    assert len(names) > 20
    for name in names:
        assert any((root / name).exists() for root in (ROOT, ROOT / "unic_ds")), name


@pytest.mark.parametrize("file", NAMING_TESTS)
def test_every_path_of_the_repository_exists(file):
    text = (ROOT / file).read_text()
    folders = r"(?<![\w/])(?:unic_ds|kernels|slurm|docs|ds_configs)"
    named = re.findall(rf"{folders}/[\w/.*-]+\.(?:py|sh|md|json)\b", text)
    for name in (*named, *re.findall(r"\btests/[\w/.*-]*\w", text)):
        assert any(ROOT.glob(name)), name


@pytest.mark.parametrize("file", NAMING_TESTS)
def test_every_link_leads_to_a_file_and_its_heading(file):
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", (ROOT / file).read_text()):
        target = (ROOT / file).parent / link if link else ROOT / file
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), (link, anchor)


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


def test_the_command_of_your_own_run_is_understood(tmp_path):
    command = re.search(r"--recipe unic_b --data.train DIR \\\n\s+--teachers (\S+)", TEXT).group(1)
    teachers = overrides.parse_teachers(command)
    assert [t.name for t in teachers] == ["dino", "clip"]
    assert teachers[1].source == "open_clip:ViT-H-14-quickgelu/metaclip_fullcc"


def test_a_teacher_of_your_own_works(tmp_path, monkeypatch):
    (tmp_path / "my_teacher.py").write_text(EXTENSIONS["my_teacher"])
    monkeypatch.syspath_prepend(tmp_path)
    row = Teacher(name="mine", source="python:my_teacher:build", precision="fp32")
    teacher = load(row, grid=14, device=torch.device("cpu"))
    tokens = teacher(torch.zeros(2, 3, teacher.size, teacher.size, dtype=torch.uint8))
    assert tokens.cls_BC.shape == (2, 64)
    assert tokens.patch_BNC.shape == (2, 196, 64)


@pytest.fixture
def extend(tmp_path):
    """Runs a module of docs/extend.md; what it adds to the registries is removed afterwards."""
    registries = [RECIPES, sources.SOURCES, EVALUATORS, TERMS, BALANCERS]
    before = [dict(registry) for registry in registries]

    def run(name):
        (tmp_path / f"{name}.py").write_text(EXTENSIONS[name])
        runpy.run_path(str(tmp_path / f"{name}.py"), run_name=name)

    yield run
    for registry, rows in zip(registries, before, strict=True):
        registry.clear()
        registry.update(rows)


def test_a_source_of_the_docs_has_an_outline(extend):
    extend("my_source")
    row = Teacher(name="r18", source="torchvision:resnet18", precision="fp32", size=64)
    assert sources.outline(row, grid=2).size == 64
    with pytest.raises(ValueError, match=r"teachers.r18.source: .*no_such"):
        sources.outline(Teacher(name="r18", source="torchvision:no_such"), grid=2)


def test_an_evaluator_of_the_docs_finds_the_nearest_class_mean(extend):
    extend("my_evaluator")
    feature_RC = torch.eye(4)[[0, 0, 1, 1]]
    sides = [
        FeatureSet({"m": feature_RC}, torch.arange(4), torch.tensor(label_N))
        for label_N in ([3, 3, 5, 5], [3, 3, 5, 3])
    ]
    data = EvalData({}, options=Eval(), seed=0, device=torch.device("cpu"))
    data.extracted |= {("train", "m"): sides[0], ("val", "m"): sides[1]}
    model = Model("m", 32, frozenset({"cls"}), encode=None)
    (score,) = EVALUATORS["class_mean"].evaluate([model], data)
    assert (score.model, score.name, score.value) == ("m", "class_mean", 75.0)


def test_a_term_and_a_balancer_of_the_docs_have_their_values(extend):
    extend("my_term")
    extend("my_balancer")
    gap_BC = torch.tensor([[3.0, -1.0]])
    loss_B = TERMS["charbonnier"](gap_BC, torch.zeros(1, 2), None)
    assert loss_B.tolist() == pytest.approx([2.0], abs=1e-5)
    coefficient_TB = BALANCERS["hardest"](torch.ones(2))(
        torch.tensor([[1.0, 3.0], [2.0, 1.0]]), None
    )
    assert coefficient_TB.tolist() == [[0.0, 0.5], [0.5, 0.0]]


def test_a_recipe_of_the_docs_is_a_config(extend):
    extend("my_recipe")
    cfg = METHODS["unic"](RECIPES["vit_s"]())
    assert (cfg.plugins, [row.weight for row in cfg.teachers]) == (("my_recipe",), [1, 0.5])


@pytest.mark.parametrize("name", ["quickstart", "unic_b", "unic_l", "unic_g"])
def test_every_recipe_of_the_table_can_be_asked_for(name):
    assert f"| `{name}` |" in TEXT
    assert job.configure(name, {}).recipe == name
