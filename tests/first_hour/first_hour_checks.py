"""The first hour's checks: each starts commands and makes a figure of what they print."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from xml.etree import ElementTree

import first_hour_commands as commands
from first_hour_attempt import (
    Attempt,
    Found,
    Session,
    Skip,
    compared,
    every_json,
    last_json,
    options,
    planned,
)
from first_hour_commands import ROOT, Failed, Late

FIRST_TESTS = ("test_ladder_triton", "test_losses_triton", "test_dali_outputs")
TRAINED = ("deepspeed", "open_clip", "tensorboard", "fire")
STEPS, LOG_EVERY, MICRO = 20, 5, (32, 16, 8, 4)
ZERO2 = {"ds_config": "ds_configs/zero2.json"}
UNIC_L = ZERO2 | {"recipe": "unic_l", "stages": "", "optim.batch_size": "32"}
RANDOM = ("dinov2_g", "metaclip_h")
TINY = ZERO2 | {
    "recipe": "unic_b",
    "precision": "fp32",
    "teachers": "small=python:first_hour_parts:small",
    "student.model": "test_vit",
    "student.size": "32",
    "student.drop_path": "0.1",
    "ladder.rungs": "2,5",
    "ladder.width": "96",
    "optim.batch_size": "8",
    "optim.steps": "20",
    "optim.warmup_epochs": "0",
}
"""A run of seconds, on a CPU too."""


class Check(NamedTuple):
    """A check, and what it needs."""

    name: str
    run: Callable[[Attempt], Found]
    limit: float  # seconds
    gpu: bool = False
    needs: tuple[str, ...] = ()  # modules
    files: tuple[str, ...] = ()


def all_checks() -> list[Check]:
    """The checks, those first whose answer is worth most."""
    tests = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if marked_gpu(file)]
    first = [file for name in FIRST_TESTS for file in tests if file.stem == name]
    torch = ("torch", "triton", "numpy")
    run = (*torch, "timm", *TRAINED)
    return [
        Check("machine", machine, 10),
        *(tests_of(file) for file in first),
        Check("bench-step", bench_step, 150, needs=torch),
        Check("peaks", peaks, 60, needs=torch),
        Check(
            "sync-step",
            sync_step,
            120,
            gpu=True,
            needs=(*run, "pytest"),
            files=("tests/support/sync_step.py",),
        ),
        Check("training", partial(training, every=False), 240, needs=(*run, "PIL")),
        Check("compile-stages", compile_stages, 240, needs=(*run, "PIL")),
        Check("doctor", doctor, 90, needs=(*run, "PIL")),
        Check("models", models, 120, needs=(*torch, "timm", "open_clip")),
        Check("patch-embed", patch_embed, 60, needs=(*torch, "timm"), files=(PATCH_EMBED,)),
        Check("bench-ops", bench_ops, 120, needs=torch),
        Check("training-all", partial(training, every=True), 240, needs=(*run, "PIL")),
        *(tests_of(file) for file in tests if file not in first),
    ]


PATCH_EMBED = "tests/support/patch_embed.py"


def marked_gpu(file: Path) -> bool:
    """True for a file that has tests marked gpu."""
    return "pytest.mark.gpu" in file.read_text() and file.name != "test_first_hour.py"


def tests_of(file: Path) -> Check:
    """The tests of a file that are marked gpu."""
    return Check(
        file.stem, partial(pytest_file, file=file), 180, gpu=True, needs=("torch", "pytest")
    )


def pytest_file(attempt: Attempt, file: Path) -> Found:
    """Run a file's tests that are marked gpu; a module that its imports lack skips it."""
    report = attempt.folder / "junit.xml"
    words = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist")
    output = attempt.python(*words, f"--junit-xml={report}", file, codes=range(6))
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", output)
    if not report.is_file():
        if missing:
            raise Skip(f"{missing[1]} is not installed")
        raise Failed(commands.reason_in(output))
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            message = problem.get("message", "").strip()
            if missing and message == "collection failure":
                raise Skip(f"{missing[1]} is not installed")
            first = (message or problem.text or "").strip().partition("\n")[0]
            raise Failed(f"{case.get('name')}: {first}")
    skipped = [case.find("skipped") for case in cases]
    reasons = sorted({found.get("message", "") for found in skipped if found is not None})
    passed = skipped.count(None)
    if not passed:
        raise Skip("; ".join(reasons) or "no test of it is marked gpu")
    rest = f", {len(cases) - passed} skipped ({'; '.join(reasons)})" if reasons else ""
    return Found(f"{passed} tests{rest}", data={"passed": passed, "skipped": len(cases) - passed})


def machine(attempt: Attempt) -> Found:
    """The GPUs that torch sees; Failed where the node has devices and torch sees none."""
    found = attempt.session.machine
    if problem := found.get("torch_error"):
        raise Skip(f"torch cannot be imported: {problem}")
    if found["devices"] and not found["gpus"]:
        raise Failed(
            f"the node has {len(found['devices'])} NVIDIA devices, but torch sees none; compare"
            f" nvidia-smi with the CUDA that torch was built for ({found['cuda']})"
        )
    if not found["gpus"]:
        return Found("no GPU: a run on the CPU")
    gpu = found["gpus"][0]
    text = f"{len(found['gpus'])} x {gpu['name']}, {gpu['memory_gb']} GB, sm {gpu['capability']}"
    return Found(text, expected=found["plan_gpu"] and f"as {found['plan_gpu']}")


def bench(attempt: Attempt, *words: str) -> list[dict[str, Any]]:
    """Measured rows of kernels/bench.py."""
    file = attempt.folder / "bench.jsonl"
    attempt.python("kernels/bench.py", *words, "--json", file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row["kind"] == "measured"]


def bench_step(attempt: Attempt) -> Found:
    """Ladder and loss together at UNIC-L's shapes, 224 px, checked and timed."""
    few = () if attempt.session.gpus else ("--images", "1", "--repeats", "1")
    rows = bench(attempt, "--op", "step", "--case", "unic_l", *few)
    ours = next(r for r in rows if (r["way"], r["mode"]) == ("ours/hidden", "both"))
    count = ours["images"]
    figure = (
        f"{count} image{'s' * (count > 1)}: {speed(ours)}, {ours['of_plain']:.2f} x plain torch"
    )
    expected = ""
    if attempt.session.gpus:
        made = planned(attempt, UNIC_L | {"student.size": "224"})
        expected = compared(made, "ladder", "ladder")
    attempt.session.shares["ladder"] = ours.get("of_roof")
    return Found(figure, expected, {"rows": rows})


def bench_ops(attempt: Attempt) -> Found:
    """Ladder, loss and statistics, each beside the roof of FLOPs or bytes."""
    words = ["--op", "ladder", "--op", "distill_loss", "--op", "moments", "--case", "unic_l"]
    if not attempt.session.gpus:
        words = [*words[2:-1], "unic_b", "--images", "1", "--repeats", "1"]
    rows = bench(attempt, *words)
    ours = [r for r in rows if r["way"] in ("ours", "ours/hidden") and r["mode"] in ("both", "fwd")]
    last = {row["op"]: row for row in ours}  # both, where there is a backward
    if "ladder" in last:
        attempt.session.shares["ladder"] = last["ladder"].get("of_roof")
    return Found("; ".join(f"{op} {speed(row)}" for op, row in last.items()), data={"rows": rows})


def speed(row: dict[str, Any]) -> str:
    """A measured row's time, and its share of the device's roof where that is known."""
    share = f", {row['of_roof']:.0%} of the roof" if row.get("of_roof") else ""
    rate = f", {row['tflops']:.3g} TFLOP/s" if row["tflops"] else ""
    return f"{short(row['ms'])} ms{rate}{share}"


def short(value: float) -> str:
    """A number with three digits at least, never as a power of ten."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def peaks(attempt: Attempt) -> Found:
    """Memory bandwidth, matrix products and attention as this device does them."""
    found = last_json(attempt.python("kernels/bench_peaks.py", "--json"))
    best = {}
    for row in found["rows"]:
        if row["value"] > best.get(row["kind"], {"value": 0})["value"]:
            best[row["kind"]] = row
    attempt.session.peaks = {kind: row["value"] for kind, row in best.items()}
    for kind in best:
        known = [row["share"] for row in found["rows"] if row["kind"] == kind and row["share"]]
        attempt.session.shares[kind] = median(known) if known else None
    figure = "; ".join(f"{kind} {short(r['value'])} {r['unit']}" for kind, r in best.items())
    shares = [f"{kind} {r['share']:.0%}" for kind, r in best.items() if r["share"]]
    return Found(figure, f"of the data sheet: {', '.join(shares)}" if shares else "", found)


def sync_step(attempt: Attempt) -> Found:
    """Optimiser steps in which nothing may wait for the whole device."""
    try:
        attempt.python("tests/support/sync_step.py", "--json")
    except Late:
        raise
    except Failed:
        if rows := every_json(attempt.output):
            raise Failed(waits_of(rows)) from None
        raise
    rows = every_json(attempt.output)
    if not rows or any(row["synchronizations"] for row in rows):
        raise Failed(waits_of(rows) or "tests/support/sync_step.py printed no line of JSON")
    return Found(waits_of(rows), "0 waits for the device", {"stages": rows})


def waits_of(rows: Sequence[dict[str, Any]]) -> str:
    """Waits of the host in a step under each ZeRO stage, and its loss beside DeepSpeed's own."""
    return "; ".join(
        f"ZeRO-{row['stage']}: {row['synchronizations']} waits for the device,"
        f" {row['host_reads']} host reads"
        + (f", loss differs by {row['difference']:.1g}" if row.get("difference") else "")
        for row in rows
    )


def patch_embed(attempt: Attempt) -> Found:
    """A patch embedding as a convolution, and as reshape and Linear."""
    found = last_json(attempt.python(PATCH_EMBED, "--json"))
    text = "; ".join(
        f"{what} {short(found[f'conv{end}_ms'])} ms, as Linear {short(found[f'linear{end}_ms'])}"
        for what, end in (("forward", ""), ("with backward", "_backward"))
        if f"conv{end}_ms" in found
    )
    return Found(text, data=found)


def models(attempt: Attempt) -> Found:
    """Teachers' forward and the student's forward and backward, and how long the host queues."""
    found = last_json(attempt.python("tests/first_hour/first_hour_parts.py", "models"))
    parts = found["parts"]
    text = "; ".join(
        f"{name} {short(part['ms'])} ms (host {short(part['host_ms'])}),"
        f" {part['tflops']:.3g} TFLOP/s"
        for name, part in parts.items()
    )
    teachers = [part for name, part in parts.items() if name != "student"]
    attempt.session.shares["teachers"] = overall(teachers)
    attempt.session.shares["student"] = parts["student"]["share"]
    expected = ""
    if attempt.session.gpus:
        made = planned(attempt, UNIC_L)
        expected = compared(made, "teachers", "teachers")
        expected += "; " + compared(made, "student", "encoder").removeprefix("planner: ")
    return Found(text, expected, found)


def overall(parts: Sequence[dict[str, Any]]) -> float | None:
    """Share of the peak that parts reach together; None where the peak is not known."""
    if any(part["share"] is None for part in parts):
        return None
    return sum(part["share"] * part["ms"] for part in parts) / sum(part["ms"] for part in parts)


def training(attempt: Attempt, *, every: bool) -> Found:
    """Twenty steps of UNIC-L at 336 px with teachers without weights, ZeRO-2; on a CPU a tiny run.

    On one device, or on `every` one of the node (two ranks where there is no GPU).
    """
    gpus = attempt.session.gpus
    if every and gpus == 1:
        raise Skip("there is one GPU; `training` used it")
    ranks = (gpus or 2) if every else 1
    given, made = settings_for(attempt, ranks)
    given |= {"data.train": attempt.images(512 if gpus else 32), "out": attempt.folder / "run"}
    given |= {"optim.steps": STEPS, "optim.warmup_epochs": 0, "eval.on": "false"}
    given |= {"run.log_every": LOG_EVERY}
    place = ("--num_gpus", ranks, "--master_port", free_port())
    launcher = ("-m", "deepspeed.launcher.runner", *place)
    attempt.python(*launcher, "unic_ds/train.py", *options(given))
    rows = log_of(attempt.folder / "run", STEPS)
    fast = median(row["images_per_s"] for row in rows[1:])
    mfu = median(row.get("mfu", math.nan) for row in rows[1:])
    figure = f"{ranks} rank{'s' * (ranks > 1)}: {short(fast)} img/s{share(mfu)}"
    figure += f", {rows[-1]['mem_gb']:.1f} GB"
    planner = made.get("problem", "")
    if not planner:
        said, part = made["images_per_s"], fast / made["images_per_s"]
        planner = f"planner: {short(said)} img/s{share(made['mfu'])}; {part:.0%} of it reached"
    return Found(figure, planner, {"log": rows, "plan": made})


def settings_for(attempt: Attempt, ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the run, and its plan: the largest micro batch that fits."""
    if not attempt.session.gpus:
        tiny = TINY | {"optim.batch_size": 8 * ranks}
        return tiny, planned(attempt, tiny, count=ranks)
    for micro in MICRO:
        given = UNIC_L | {"optim.batch_size": micro * ranks}
        made = planned(attempt, given, count=ranks)
        if "problem" in made or made["fits"]:
            break
    teachers = ",".join(f"{name}=python:first_hour_parts:{name}" for name in RANDOM)
    return given | {"teachers": teachers}, made


def share(mfu: float) -> str:
    """The share of the peak, where it is known."""
    return "" if math.isnan(mfu) else f", MFU {mfu:.0%}"


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def log_of(out: Path, steps: int) -> list[dict[str, Any]]:
    """Rows of a run's log; Failed unless it reached `steps` and every loss is finite."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    if not rows or rows[-1]["step"] != steps:
        raise Failed(f"the log of {out.name} ends before step {steps}")
    if not all(isinstance(row["loss"], float) and math.isfinite(row["loss"]) for row in rows):
        raise Failed(f"a loss in the log of {out.name} is not finite")
    return rows


def compile_stages(attempt: Attempt) -> Found:
    """A run of two stages and an evaluation after each, student and teachers compiled."""
    images, out = attempt.images(32), attempt.folder / "run"
    more = {"stages": "student.size=32 optim.steps=2", "student.size": 48, "optim.steps": 3}
    more |= {"data.train": images, "data.val": images, "eval.k": 3}
    more |= {"run.compile": "all", "run.log_every": 1, "out": out}
    output = attempt.python("unic_ds/train.py", *options(TINY | more))
    if found := re.search(r".*recompile_?\s?limit.*", output):
        raise Failed(f"blocks fell back to eager: {found[0].strip()}")
    first, last = log_of(out / "stage1", 2), log_of(out, 3)
    return Found(f"loss {first[-1]['loss']:.3f}, {last[-1]['loss']:.3f}", "no recompile limit")


def doctor(attempt: Attempt) -> Found:
    """The doctor under torchrun on every GPU of the node; without one, two ranks on the CPU."""
    ranks = attempt.session.gpus or 2
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    given = TINY | {"data.train": attempt.images(32), "out": attempt.folder / "run"}
    verb = ("-m", "unic_ds.cli", "doctor", *options(given), "--json")
    found = last_json(attempt.python(*launcher, *verb, codes=(0, 1)))
    checks = found["checks"]
    wrong = [f"{c['check']}: {c['result']}; {c['remedy']}" for c in checks if c["state"] == "fails"]
    if wrong or found["fails"]:
        raise Failed(" | ".join(wrong))
    warned = [row["check"] for row in checks if row["state"] == "warning"]
    speed_of = next(row["result"] for row in checks if row["check"] == "all-reduce")
    warns = f"; warns of {', '.join(warned)}" if warned else ""
    return Found(f"{speed_of}{warns}", data=found)


def efficiency(session: Session) -> str:
    """Values of the planner's --efficiency that the measurements suggest; empty without any.

    Of those that this planner has, the shares of the data sheet's peaks as they were measured.
    """
    known, shares = session.machine["efficiency"], session.shares
    found = {name: value for name, value in shares.items() if name in known and value}
    return ",".join(f"{name}={min(1.0, value):.2f}" for name, value in found.items())
