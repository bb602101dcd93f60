"""Figures of the package's structure: `python tests/support/structure.py` prints them.

Exit code 1 if one passes its limit. tests/test_floors.py asserts each by itself.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "unic_ds"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = ("files", "rng", "tokens", "blocks", "process", "demo", "config", "dist", "models")
"""Rooms that everything stands on; each may import those before it."""

FLOORS: tuple[Collection[str], ...] = (
    GROUND,
    {"data", "teachers", "losses", "engine", "evaluate"},
    {"weights", "planning", "harness", "report", "analysis"},
    {"training", "ablation"},
    {"train", "doctor"},
    {"cli"},
)
"""From the ground up; a room is a package or file. Rooms of one floor do not import each other."""

LIMITS = {
    "rooms": 24,
    "floors": 6,
    "imports upwards": 0,
    "import circles": 0,
    "imports inside functions": 38,
    "bare Any": 40,
    "lines of train_step": 25,
    "lines of train_loop": 25,
}


@dataclass(frozen=True)
class Import:
    """An import of one of our modules, or of a library."""

    file: Path
    line: int
    name: str
    inside: bool  # a function

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def name_of(file: Path) -> str:
    """Path of a file below unic_ds."""
    return file.relative_to(PACKAGE).as_posix()


def module_of(file: Path) -> str:
    """Dotted name of a file's module."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(file: Path) -> str:
    """The package or file of unic_ds that a file lies in; "" for unic_ds/__init__.py."""
    return name_of(file).split("/")[0].removesuffix(".py").replace("__init__", "")


@cache
def tree_of(file: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(file.read_text())


@cache
def imports_of(file: Path) -> tuple[Import, ...]:
    """All imports of a file, with the dotted name of what is imported."""
    return tuple(walk_imports(file))


def walk_imports(file: Path) -> Iterator[Import]:
    """The imports of a file, in any order."""
    tree = tree_of(file)
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, id(node) in inside)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno} imports relatively"
            for alias in node.names:
                yield Import(file, node.lineno, f"{node.module}.{alias.name}", id(node) in inside)


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all below it, but for bodies of `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from at_run_time(child)


def rooms() -> list[str]:
    """Packages and files of unic_ds."""
    return sorted({room_of(file) for file in FILES} - {""})


def height(room: str) -> int:
    """The floor of a room, from 0."""
    floors = [i for i, floor in enumerate(FLOORS) if room in floor]
    assert floors, f"unic_ds/{room} stands on no floor; add it to FLOORS"
    return floors[0]


def points_down(here: str, room: str) -> bool:
    """True if `here` may import `room`."""
    if here in GROUND and room in GROUND:
        return GROUND.index(room) < GROUND.index(here)
    return height(room) < height(here)


def upwards() -> list[Import]:
    """Imports of a room that is not below."""
    return [
        found
        for file in FILES
        for found in imports_of(file)
        if found.name.startswith("unic_ds.")
        and (room := found.name.split(".")[1]) not in (room_of(file), "__version__")
        and not points_down(room_of(file), room)
    ]


def circles() -> list[str]:
    """Modules that import each other, as dotted names, where there are any."""
    modules = {module_of(file): file for file in FILES}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        names = {found.name for found in imports_of(file)}
        used = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (used & modules.keys()) - {module, "unic_ds"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def local_imports() -> list[Import]:
    """Imports inside functions: a statement counts once."""
    found = {(i.file, i.line): i for file in FILES for i in imports_of(file) if i.inside}
    return list(found.values())


def bare_any() -> list[str]:
    """Parameters, results and fields whose whole type is Any."""
    found = []
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            kind: ast.expr | None = None
            if isinstance(node, ast.FunctionDef):
                kind = node.returns
            elif isinstance(node, ast.arg | ast.AnnAssign):
                kind = node.annotation
            if isinstance(kind, ast.Name) and kind.id == "Any":
                found.append(f"{file.relative_to(ROOT)}:{kind.lineno}")
    return found


def lines_of(function: str, file: str) -> int:
    """Lines of a function's body, without its docstring, comments and blank lines."""
    for node in ast.walk(tree_of(PACKAGE / file)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (PACKAGE / file).read_text().splitlines()[body[0].lineno - 1 : node.end_lineno]
            return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
    raise AssertionError(f"unic_ds/{file} has no {function}")


@cache
def figures() -> dict[str, int]:
    """Each figure of `LIMITS`."""
    return {
        "rooms": len(rooms()),
        "floors": len(FLOORS),
        "imports upwards": len(upwards()),
        "import circles": len(circles()),
        "imports inside functions": len(local_imports()),
        "bare Any": len(bare_any()),
        "lines of train_step": lines_of("train_step", "training/loop.py"),
        "lines of train_loop": lines_of("train_loop", "training/loop.py"),
    }


def main() -> int:
    """Print the figures beside their limits; 1 if one passes its limit."""
    found = figures()
    for name, value in found.items():
        print(f"{name:26} {value:4}   at most {LIMITS[name]}")
    if "--list" in sys.argv:
        print(*upwards(), *circles(), *local_imports(), *bare_any(), sep="\n")
    return int(any(value > LIMITS[name] for name, value in found.items()))


if __name__ == "__main__":
    sys.exit(main())
