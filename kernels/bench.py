"""Time and count the ops on the cases of real runs, beside plain torch.

    python kernels/bench.py                              every case; minutes on two CPU cores
    python kernels/bench.py --op step --case unic_b      ladder and loss together, one case
    python kernels/bench.py --csv bench.csv --json bench.jsonl --plot pictures

An op is first checked against the plain algebra in fp64, on a narrow case; if that fails, no number
is printed and the exit code is 1. Counts (launches, bytes, FLOPs, activations kept) are of
the case at its GPU batch and need no device. Times are of the machine at hand: with CUDA of the
Triton kernels, without of the CPU path, never of a GPU that is not there.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import bench_time  # noqa: E402
import torch  # noqa: E402
from bench_cases import CASES, Case  # noqa: E402
from bench_work import NAMES, compiled_launches, counts, faults, shares  # noqa: E402

OPS = tuple(NAMES)
USUAL = ("step", "distill_loss", "moments")
Row = dict[str, Any]


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--op",
        action="append",
        choices=OPS,
        help="this op; may be given again. step: ladder and loss together. Default: all but ladder",
    )
    cases = "; ".join(f"{case.name}: {case.about}" for case in CASES.values())
    add("--case", action="append", choices=list(CASES), help=f"this case alone. {cases}")
    add(
        "--images",
        type=positive,
        help="batch to time (default: the run's; on a CPU few, of vit_g_40 none)",
    )
    add("--repeats", type=positive, help="rounds on a CPU after one to warm up (default: 3 or 5)")
    add("--counts", action="store_true", help="count, do not time")
    add("--compile", action="store_true", help="compile plain as well (minutes)")
    add("--csv", type=Path, metavar="FILE", help="write every result as a row")
    add("--json", type=Path, metavar="FILE", help="write every result as a line of JSON")
    add("--plot", type=Path, metavar="DIR", help="draw pictures (PNG); needs matplotlib")
    add(
        "--perturb",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="change our results by this share before the check, which must then fail",
    )
    return parser


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def count(op: str, case: Case, compile_: bool) -> list[Row]:
    """Count an op on a case, print it, return its rows."""
    print(f"\n{op} | {case.name} | counted at {case.images} images, forward unless said")
    print(
        f"  {'':14}{'launches':>10}{'GB moved':>10}{'TFLOP':>9}{'bwd':>9}{'GB kept':>9}{'syncs':>7}"
    )
    rows = []
    for name, found in counts(op, case, case.images, NAMES[op]).items():
        if name == "plain":
            base = found
        line = f"{found.launches:10}{found.gigabytes:10.2f}{found.forward_tflop:9.2f}"
        line += f"{found.backward_tflop:9.2f}{found.kept_gigabytes:9.2f}{found.syncs:7}"
        part = found.kept_gigabytes / base.kept_gigabytes if base.kept_gigabytes else 0
        print(f"  {name:14}{line}" + (f"  keeps {part:.3f} of plain" if part else ""))
        row = {"op": op, "case": case.name, "kind": "counted", "images": case.images, "way": name}
        rows.append(row | found._asdict() | {"kept_of_plain": part})
    if compile_ and op == "step":
        launches = compiled_launches(case)
        print(f"  {'compiled plain':14}{launches:10}  (kernels and GEMM calls that inductor wrote)")
        rows.append(
            {
                "op": op,
                "case": case.name,
                "kind": "counted",
                "way": "compiled",
                "launches": launches,
            }
        )
    return rows


def figure(name: str, value: float, target: float, *, most: bool, form: str = ".3f") -> Row:
    """Print a figure with its target; return its row."""
    reached = value <= target if most else value >= target
    sign = "<=" if most else ">="
    verdict = "reached" if reached else "NOT REACHED"
    print(f"  {name}: {value:{form}} (target {sign} {target:{form}}) {verdict}")
    return {"kind": "figure", "way": name, "value": value, "target": target, "reached": reached}


def figures(op: str, case: Case, rows: list[Row]) -> list[Row]:
    """Compare the counted rows of ladder and loss with their targets; print and return rows."""
    if op != "step":
        return []
    by = {row["way"]: row for row in rows}
    most = 4 * case.rungs + 2 * len(case.out) + 12
    found = [
        figure("launches forward", by["ours/hidden"]["launches"], most, most=True, form=".0f"),
        figure(
            "kept, recompute=hidden / plain", by["ours/hidden"]["kept_of_plain"], 1 / 2, most=True
        ),
        figure("kept, recompute=all / plain", by["ours/all"]["kept_of_plain"], 1 / 8, most=True),
        figure("host syncs", by["ours/hidden"]["syncs"], 0, most=True, form=".0f"),
    ]
    slack = 1.02 if case.patches % 128 == 0 else 1.10
    for path, done, least in shares(case):
        text = f"backward FLOPs / kept pairs' ({least:.3f} of dense), {path}"
        found.append(figure(text, done / least, slack, most=True))
    return [{"op": op, "case": case.name} | row for row in found]


def main() -> int:
    """Return the exit code: 1 if a check fails."""
    parser = options()
    given = parser.parse_args()
    if given.plot:
        try:
            import bench_plot
        except ImportError:
            parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stamp = bench_time.machine(device) | {"date": datetime.now(UTC).strftime("%Y-%m-%d")}
    print(", ".join(f"{key} {value}" for key, value in stamp.items()))
    rows: list[Row] = []
    for case in (CASES[name] for name in given.case or CASES):
        for op in given.op or USUAL:
            if wrong := faults(op, case, torch.bfloat16, device, NAMES[op], given.perturb):
                print(*wrong, "the check failed, so nothing is measured", sep="\n", file=sys.stderr)
                return 1
            rows += (new := count(op, case, given.compile))
            rows += figures(op, case, new)
            images = given.images or (case.images if device == "cuda" else case.cpu_images)
            if images and not given.counts:
                rows += bench_time.measure(op, case, images, device, given.repeats, given.compile)
    rows = [row | stamp for row in rows]
    if given.json:
        given.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if given.csv:
        write_csv(given.csv, rows)
    if given.plot:
        for file in bench_plot.draw(rows, given.plot):
            print(file)
    return 0


def write_csv(file: Path, rows: list[Row]) -> None:
    """Write a column for every key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
