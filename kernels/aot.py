"""Compile every kernel that ships for every architecture, without a device, and compare with a
golden table.

    python kernels/aot.py                 print the table
    python kernels/aot.py --check         fail if it differs from aot.json, or may not ship
    python kernels/aot.py --write         make kernels/aot.json anew
    python kernels/aot.py --op moments    one op alone; also --arch 90

Compiled is everything that `builds(arch)` of an op's `launch.py` yields. Code may not ship if it
spills to the stack, wants more shared memory than a block can have, or multiplies bf16 without
tensor cores, without asynchronous copies, or with operands loaded number by number. Numbers depend
on the compiler, so the table names the versions that it holds for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "aot.json"
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block can have (CUDA programming guide, compute capabilities)."""
INSTRUCTIONS = {
    "mma": r"\bHG?MMA\b|\bUTC\w*MMA\b",
    "spill": r"\b(?:STL|LDL)\b",
    "wide": r"\b(?:LDG|STG)\S*\.128\b",
    "narrow": r"\bLDG\S*\.[US]?(?:8|16)\b",
    "async": r"\bLDGSTS\b|\bUTMALDG\b",
}
"""Counted in the machine code; `wide` are accesses of 16 bytes to global memory, `narrow` are loads
of one or two.
"""

sys.path.insert(0, str(HERE))


def ops() -> list[str]:
    """Names of the ops that have kernels to compile."""
    return sorted(file.parent.name for file in (HERE / "unic_kernels").glob("*/launch.py"))


def builds(names: list[str], archs: list[int]) -> Iterator[tuple[str, int, Any]]:
    """Yield op, architecture and build of everything asked for."""
    for name in names:
        module = importlib.import_module(f"unic_kernels.{name}.launch")
        for arch in archs:
            yield from ((name, arch, build) for build in module.builds(arch))


def compiled(arch: int, build: Any) -> Any:
    """Compile a build, as the launcher would on a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        written = "constexpr" if name in build.constants else build.types[name]
        signature[name], _, divisor = written.partition(":")
        if divisor:
            attributes[i,] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(build.kernel, signature, dict(build.constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(build.options))


def tool(name: str, *arguments: str) -> str:
    """Return the output of one of the binary tools that come with triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def measure(op: str, arch: int, build: Any) -> tuple[str, dict[str, int]]:
    """Return a row of the table: resources and instructions of the compiled code."""
    kernel = compiled(arch, build)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"\b(REG|STACK):(\d+)", tool("cuobjdump", "-res-usage", file.name)))
        code = tool("nvdisasm", "-c", file.name)
    row = {"registers": int(usage["REG"]), "stack": int(usage["STACK"])}
    row |= {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    row["dots"] = len(re.findall(r"tt\.dot .*bf16", kernel.asm["ttir"]))
    row |= {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    return f"{op} | {build.name} | sm_{arch}", row


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    import triton

    found = re.search(r"V\d+\.\d+\.\d+", tool("ptxas", "--version"))
    return {"triton": triton.__version__, "ptxas": found[0] if found else "unknown"}


def faults(key: str, row: dict[str, int]) -> list[str]:
    """Return the reasons why a row may not ship."""
    most = SHARED[int(key.rpartition("_")[2])]
    found = [f"{name} {row[name]}" for name in ("stack", "spill") if row[name]]
    if row["shared"] > most:
        found.append(f"shared {row['shared']} > {most}")
    if row["dots"] and not row["mma"]:
        found.append("a product in bf16 without tensor cores")
    if row["dots"] and row["narrow"] > 1:  # one is the bias: a number a thread, side by side
        found.append(f"a product in bf16 with {row['narrow']} loads of one number each")
    if row["dots"] and not row["async"]:
        found.append("a product in bf16 without asynchronous copies")
    return found


def differences(table: dict[str, Any], golden: dict[str, Any], *, whole: bool) -> list[str]:
    """Return the differences from the golden table; a row may be absent unless all was compiled."""
    if golden["versions"] != versions():
        return [f"the table holds for {golden['versions']}, here is {versions()}: run with --write"]
    rows = golden["rows"]
    found = [f"{key}: not in the table" for key in table.keys() - rows.keys()]
    found += [f"{key}: gone" for key in rows.keys() - table.keys() if whole]
    found += [
        f"{key}: {name} was {rows[key].get(name)}, is {value}"
        for key in table.keys() & rows.keys()
        for name, value in table[key].items()
        if rows[key].get(name) != value
    ]
    return sorted(found)


def show(table: dict[str, dict[str, int]]) -> None:
    """Print the table."""
    width = max(map(len, table))
    print(" " * width, *(f"{name:>9}" for name in next(iter(table.values()))))
    for key, row in table.items():
        print(f"{key:{width}}", *(f"{value:9}" for value in row.values()))


def main() -> int:
    """Return the exit code: 1 if something may not ship or differs from the golden table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the golden table")
    mode.add_argument("--write", action="store_true", help="make the golden table anew")
    parser.add_argument("--op", action="append", choices=ops(), help="this op alone")
    parser.add_argument(
        "--arch", action="append", type=int, choices=list(SHARED), help="this alone"
    )
    given = parser.parse_args()
    whole = not (given.op or given.arch)
    if given.write and not whole:
        parser.error("--write makes the whole table; leave out --op and --arch")

    todo = list(builds(given.op or ops(), given.arch or list(SHARED)))
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda job: measure(*job), todo))
    table = dict(rows)
    assert len(table) == len(rows), "two builds of an op have one name"
    show(table)
    wrong = [f"{key}: {fault}" for key, row in table.items() for fault in faults(key, row)]
    if given.check:
        wrong += differences(table, json.loads(GOLDEN.read_text()), whole=whole)
    if given.write:
        golden = {"versions": versions(), "rows": table}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
