"""Imports point down, libraries have one owner, what answers at once imports nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "unic_ds").rglob("*.py"))

GROUND = ("files", "rng", "tokens", "blocks", "ops", "process", "demo", "config", "dist")
"""Rooms that everything stands on; each may import those before it."""

FLOORS: tuple[Collection[str], ...] = (
    GROUND,
    {"data", "teachers", "models", "losses", "engine", "evaluate"},
    {"weights", "planning"},
    {"training"},
    {"train", "doctor"},
    {"cli"},
)
"""From the ground up; a room is a package or file. Rooms of one floor do not import each other."""

UPWARDS = {("planning", "training")}
"""Imports that are still to be turned round: `plan` asks if a training command would be refused."""

OWNERS = {
    "torch.distributed": {"dist.py"},
    "deepspeed": {"engine/deepspeed_engine.py", "engine/reshard.py"},
    "nvidia.dali": {"data/dali_decoder.py"},
}
LIGHT = ("config", "config.job", "process.entry_point", "rng", "demo", "train", "cli")
HEAVY = {
    *("torch", "torchvision", "deepspeed", "timm", "open_clip", "nvidia", "tensorboard"),
    *("sklearn", "scipy", "matplotlib", "onnx", "safetensors", "PIL", "huggingface_hub"),
    "torchao",
}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT / "unic_ds").as_posix()


def room_of(file: Path) -> str:
    return name_of(file).split("/")[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Dotted name of everything that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def height(room: str) -> int:
    floors = [i for i, floor in enumerate(FLOORS) if room in floor]
    assert floors, f"unic_ds/{room} stands on no floor; add it to FLOORS"
    return floors[0]


def points_down(here: str, room: str) -> bool:
    """True if `here` may import `room`."""
    if here in GROUND and room in GROUND:
        return GROUND.index(room) < GROUND.index(here)
    return height(room) < height(here)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file: Path) -> None:
    here = room_of(file)
    rooms = {name.split(".")[1] for name in imported(file) if name.startswith("unic_ds.")}
    for room in rooms - {here, "__version__"}:
        down = points_down(here, room) or (here, room) in UPWARDS
        assert down, f"{name_of(file)} may not import {room}"


@pytest.mark.parametrize("library, owners", OWNERS.items())
def test_its_owners_alone_import_it(library: str, owners: set[str]) -> None:
    users = {
        name_of(file)
        for file in FILES
        if any(f"{name}.".startswith(f"{library}.") for name in imported(file))
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
    assert {room_of(file) for file in FILES} & set(sys.stdlib_module_names) == set()


def test_every_library_is_declared() -> None:
    declared = {plain(name) for name in re.findall(r'"([A-Za-z0-9_-]+)>=', read("setup.py"))}
    pinned = {plain(name) for name in re.findall(r"^([\w.-]+)==", read("constraints.txt"), re.M)}
    assert len(declared) > 15 and declared <= pinned
    demonstration = {plain(n) for n in re.findall(r"^([\w.-]+)==", read("demo-packages.txt"), re.M)}
    names = {name.split(".")[0] for file in FILES for name in imported(file)}
    sources = packages_distributions()
    for name in names - set(sys.stdlib_module_names) - {"unic_ds", "unic_kernels"}:
        found = {plain(distribution) for distribution in sources[name]}
        assert found & (declared | demonstration), f"{name} is imported, but setup.py lacks {found}"


def plain(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def read(name: str) -> str:
    return (ROOT / name).read_text()
