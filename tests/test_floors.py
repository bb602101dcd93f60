"""Imports point down, libraries have one owner, what answers at once imports nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest
import structure
from structure import FILES, ROOT, imports_of, name_of, rooms, tree_of

OWNERS = {
    "torch.distributed": {
        "dist/collectives.py",
        "dist/process_group.py",
        "dist/sharding.py",
        "dist/step_votes.py",
    },
    "deepspeed": {"engine/deepspeed_engine.py", "engine/reshard.py"},
    "nvidia.dali": {"data/dali_decoder.py"},
}
LIGHT = ("config", "config.job", "process.entry_point", "rng", "demo", "train", "cli")
HEAVY = {
    *("torch", "torchvision", "deepspeed", "timm", "open_clip", "nvidia", "tensorboard"),
    *("sklearn", "scipy", "matplotlib", "onnx", "safetensors", "PIL", "huggingface_hub"),
    "torchao",
}
NO_VERB = re.compile(r"(What|Whether|Where|How|Who|Which)\b")


@pytest.mark.parametrize("name", structure.LIMITS)
def test_the_structure_stays_within_its_limits(name: str) -> None:
    assert structure.figures()[name] <= structure.LIMITS[name]


def test_every_room_has_a_floor() -> None:
    assert {room for floor in structure.FLOORS for room in floor} == set(rooms())


def test_imports_point_down() -> None:
    assert structure.upwards() == []


def test_modules_import_each_other_in_no_circle() -> None:
    assert structure.circles() == []


@pytest.mark.parametrize("library, owners", OWNERS.items())
def test_its_owners_alone_import_it(library: str, owners: set[str]) -> None:
    users = {
        name_of(file)
        for file in FILES
        if any(f"{found.name}.".startswith(f"{library}.") for found in imports_of(file))
    }
    assert users == owners


def test_what_answers_at_once_imports_nothing_heavy() -> None:
    code = f"""
import sys
{"; ".join(f"import unic_ds.{name}" for name in LIGHT)}
print(*sorted(sys.modules.keys() & {HEAVY!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_no_module_hides_one_of_the_standard_library() -> None:
    """The launcher puts unic_ds/ itself first on the path."""
    assert set(rooms()) & set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("folder", ["unic_ds", "kernels", "tests"])
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
        if NO_VERB.match(ast.get_docstring(node) or "")
    ]
    assert wrong == []


def test_every_library_is_declared() -> None:
    declared = {plain(name) for name in re.findall(r'"([A-Za-z0-9_-]+)>=', read("setup.py"))}
    pinned = {plain(name) for name in re.findall(r"^([\w.-]+)==", read("constraints.txt"), re.M)}
    assert len(declared) > 15 and declared <= pinned
    demonstration = {plain(n) for n in re.findall(r"^([\w.-]+)==", read("demo-packages.txt"), re.M)}
    names = {found.name.split(".")[0] for file in FILES for found in imports_of(file)}
    sources = packages_distributions()
    for name in names - set(sys.stdlib_module_names) - {"unic_ds", "unic_kernels"}:
        found = {plain(distribution) for distribution in sources[name]}
        assert found & (declared | demonstration), f"{name} is imported, but setup.py lacks {found}"


def plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def read(name: str) -> str:
    return (ROOT / name).read_text()
