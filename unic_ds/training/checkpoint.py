"""Checkpoints: saved completely or not at all, verified before they are loaded.

A checkpoint is `checkpoints/step_NNNNNNN/`: DeepSpeed's shards under `zero/`, the teachers'
statistics, `run.json` (the step, and the settings and data it belongs to) and a manifest of sizes
and SHA-256. It is written under another name and renamed when every rank is done, so a folder of
that name is always complete; `latest` names the newest.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from torch import Tensor, nn

from unic_ds import config, dist
from unic_ds.config.extension import steps_in
from unic_ds.config.overrides import science
from unic_ds.engine.deepspeed_engine import param_order, state_copies
from unic_ds.engine.protocol import Engine
from unic_ds.engine.reshard import load_resharded
from unic_ds.files import (
    read_text,
    remove_folder,
    replace_folder,
    sha256,
    tensor_files,
    write_atomic,
)
from unic_ds.files.printable import printable
from unic_ds.process import console

MANIFEST, FACTS, STATISTICS, SHARDS = "manifest.json", "run.json", "statistics.safetensors", "zero"
LAYOUT = ("ranks", "zero_stage")
"""Facts that may differ from those of the run that resumes: the shards are then resharded."""


class RollbackRow(TypedDict):
    """A row of rollbacks.json."""

    at: int  # the last of the skipped steps
    to: int  # the step of the checkpoint that was loaded
    left_out: list[int]  # first and last step of the data order that are skipped from then on


class ProbedValue(TypedDict):
    """A value of a probe, in a checkpoint's run.json."""

    value: float
    better: Literal["higher", "lower", ""]


class FileHash(TypedDict, total=False):
    """A row of a checkpoint's manifest, or the error of reading a file."""

    bytes: int
    sha256: str
    error: str


class CheckpointFacts(TypedDict, total=False):
    """A checkpoint's run.json. It also has `--SECTION.KEY` for each option that decides the result,
    as text, and `feature cache`.
    """

    step: int
    samples: int
    seed: int
    loss: float
    probe: dict[str, ProbedValue]  # of a probe after this step, by its name in the log
    summaries: dict[str, str]  # kind of each teacher's CLS target
    rollbacks: list[RollbackRow]
    images: str
    teachers: list[list[str]]  # name and hash of each
    init: dict[str, str] | None
    decoder: str
    ranks: int
    zero_stage: int
    bf16: bool


def save(
    engine: Engine[nn.Module],
    folder: Path,
    step: int,
    *,
    facts: dict[str, Any],
    statistics: dict[str, Tensor],
    keep: config.Run,
) -> Path:
    """Write the checkpoint of `step`, then remove those that `keep` does not; every rank calls it.

    OSError, with the last good one untouched, if the disk is full or may not be written.
    """
    final = folder / f"step_{step:07d}"
    part, start = folder / f".saving_{final.name}", time.monotonic()
    create_partial(part, needed_bytes(engine))
    try:
        engine.save_checkpoint(
            str(part), tag=SHARDS, save_latest=False, client_state={"order": param_order(engine)}
        )
        if dist.rank() == 0:
            tensor_files.save(statistics, part / STATISTICS)
            write_atomic(part / FACTS, json.dumps(facts | {"step": step}, indent=1))
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot save {final.name} ({error}); {newest_name(folder)}") from error
    dist.barrier()
    hashes = hash_files(part, sync=True)
    problem = first_unreadable(hashes)
    if dist.rank() == 0:
        problem = problem or commit(part, final, hashes)
    if problem := dist.broadcast_object(problem):
        raise OSError(f"cannot save {final.name} ({problem}); {newest_name(folder)}")
    if dist.rank() == 0:
        remove_old(folder, final, keep)
    dist.barrier()
    size = sum(file["bytes"] for file in hashes.values()) / 1e6
    console.say(f"saved {final.name} in {time.monotonic() - start:.1f} s ({size:.0f} MB)")
    return final


def commit(part: Path, final: Path, hashes: dict[str, FileHash]) -> str:
    """Rename a complete checkpoint to its final name; the error if that fails, else ""."""
    try:
        write_atomic(part / MANIFEST, json.dumps(hashes, indent=1))
        replace_folder(part, final)
        write_atomic(final.parent / "latest", final.name)
    except OSError as error:
        return str(error)
    return ""


def needed_bytes(engine: Engine[nn.Module]) -> int:
    """Upper bound of the bytes that this rank is about to write.

    Its partition of fp32 weights and optimiser state, which is all or nothing under ZeRO-0; on
    rank 0 the full weights too.
    """
    count = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    full = count if dist.rank() == 0 else 0
    partition = count // dist.world() if engine.zero_optimization_stage() else full
    return 4 * full + 4 * state_copies(engine) * partition + (1 << 20)


def create_partial(part: Path, size: int) -> None:
    """Make an empty folder `part` and check that every rank's `size` bytes fit there.

    OSError on all ranks if not. DeepSpeed's save has barriers inside, where one rank's full disk
    would leave the others waiting, so all ranks check before it.
    """
    if dist.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    problem, room = "", math.inf
    probe = part / f"probe_{dist.rank()}"
    try:
        part.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            room = reserve(file.fileno(), size)
    except OSError as error:
        problem = f"rank {dist.rank()}: {error.strerror}"
    problems, sizes, rooms = zip(*dist.all_gather_objects((problem, size, room)), strict=True)
    with suppress(OSError):
        probe.unlink()
    first = next(filter(None, problems), "")
    if not first and min(rooms) < sum(sizes):
        first = f"{min(rooms) / 1e6:.0f} MB are free"
    if first:
        if dist.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"cannot save {part.name.removeprefix('.saving_')} to {str(part.parent)!r} ({first};"
            f" it takes {sum(sizes) / 1e6:.0f} MB): make room or mend its permissions and start"
            f" the same command again; {newest_name(part.parent)}"
        )


def reserve(file: int, size: int) -> float:
    """Reserve `size` bytes on the file system; OSError if it has no room for them.

    Returns infinity, or the free bytes, quotas aside, if it cannot reserve any (NFS before 4.2).
    posix_fallocate is not used: there it would write a byte into every 4 KiB.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    number = errno.EINTR
    while number == errno.EINTR:  # a signal that asks the run to stop
        if libc.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return math.inf
        number = ctypes.get_errno()
    if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(number, os.strerror(number))
    disk = os.fstatvfs(file)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else math.inf


def newest_name(folder: Path) -> str:
    """A clause that names the last good checkpoint."""
    steps = steps_in(folder)
    return (
        f"the last good checkpoint is {steps[-1].name}"
        if steps
        else "no checkpoint was saved before"
    )


def hash_files(folder: Path, *, sync: bool = False) -> dict[str, FileHash]:
    """Size and SHA-256 of every file in `folder`, or the error of reading it.

    The ranks share the work, and all return the same. `sync` flushes the files to the disk, so
    that they survive a power cut.
    """
    # Rank 0 lists for all: a network file system may return different listings to the ranks.
    listed = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = dist.on_rank_0(lambda: sorted(listed))
    hashes = {}
    for file in files[dist.rank() :: dist.world()]:
        hashes[str(file.relative_to(folder))] = hash_file(file, sync=sync)
    return {k: v for part in dist.all_gather_objects(hashes) for k, v in part.items()}


def hash_file(file: Path, *, sync: bool) -> FileHash:
    """Size and SHA-256 of a file, or its error: raised on one rank, it would hang the others."""
    try:
        if sync:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        return {"bytes": file.stat().st_size, "sha256": sha256(file)}
    except OSError as error:
        return {"error": error.strerror or str(error)}


def first_unreadable(found: dict[str, FileHash]) -> str:
    """A clause about the first file that could not be read, or ""."""
    wrong = {name: row["error"] for name, row in found.items() if "error" in row}
    return next((f"{name} cannot be read: {why}" for name, why in wrong.items()), "")


def verify(folder: Path) -> str:
    """A clause about the damage of a checkpoint, or ""; the same on all ranks."""
    expected = dist.on_rank_0(lambda: read_manifest(folder))
    if not expected:
        return f"no readable {MANIFEST}"
    found = hash_files(folder)
    if problem := first_unreadable(found):
        return problem
    for name in sorted(expected):
        if found.get(name) != expected[name]:
            return f"{printable(name)} is {'damaged' if name in found else 'missing'}"
    return ""


def read_manifest(folder: Path) -> dict[str, FileHash]:
    """Size and SHA-256 of a checkpoint's files; empty if its manifest is missing or damaged."""
    try:
        rows = json.loads(read_text(folder / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
    if not known or any(type(row.get("bytes")) is not int for row in rows.values()):
        return {}
    outside = any(Path(name).is_absolute() or ".." in Path(name).parts for name in rows)
    return {} if outside else rows


def find(folder: Path, resume: str) -> Path | None:
    """The newest undamaged checkpoint, with a warning for each damaged one; None if there is none.

    `resume` is auto, never, or the path of a checkpoint or run folder to start from as long as
    `folder` has no checkpoint. ValueError if all are damaged.
    """
    candidates = dist.broadcast_object(steps_in(folder))
    other = None if candidates or resume in ("auto", "never") else Path(resume)
    if other:
        inside = steps_in(other / "checkpoints")
        candidates = dist.broadcast_object([other] if (other / MANIFEST).is_file() else inside)
    problem = ""
    for candidate in reversed(candidates):
        problem = verify(candidate)
        if not problem:
            return candidate
        console.say(f"checkpoint {candidate.name} is damaged ({problem}); trying the previous one")
    if other or problem:
        raise ValueError(
            f"no undamaged checkpoint in {str(other or folder)!r}"
            f"{f' ({problem})' if problem else ''};"
            " give --resume another, or start a new run in another --out, from weights alone by"
            " --student.init if you like"
        )
    return None


def load(
    engine: Engine[nn.Module],
    folder: Path,
    expected: dict[str, Any],
    *,
    content_of: Mapping[str, str] | None = None,
) -> tuple[CheckpointFacts, dict[str, Tensor]]:
    """Load a checkpoint's weights and optimiser state; returns its facts and statistics.

    One of another number of ranks or ZeRO stage is resharded. A setting that its version did not
    have counts as the default. `content_of` maps the hash of a
    weight file, which older versions recorded, to that of its tensors. ValueError if it belongs to
    other images, teachers or settings.
    """
    facts = in_contents(json.loads((folder / FACTS).read_text()), content_of or {})
    defaults = defaults_for(expected["--teachers"]) if "--teachers" in expected else {}
    for key, value in expected.items():
        saved = facts.get(key, defaults.get(key))
        if saved != value and key not in LAYOUT:
            raise ValueError(
                f"checkpoint {str(folder)!r} was saved with {key} {saved!r},"
                f" this run has {value!r}; use the same (with --run.extend true --optim.steps and"
                " --optim.epochs may be more), or start a new run from its weights: another --out"
                f" and --student.init {str(folder.absolute().parent.parent / 'student')!r}"
            )
    if any(facts[key] != expected[key] for key in LAYOUT):
        before, now = (
            f"{d['ranks']} rank{'s' * (d['ranks'] > 1)}, ZeRO-{d['zero_stage']}"
            for d in (facts, expected)
        )
        console.say(f"{folder.name} was saved by {before}; resharded for {now}")
        load_resharded(engine, folder / SHARDS)
    elif engine.load_checkpoint(str(folder), tag=SHARDS)[0] is None:
        raise OSError(f"DeepSpeed found nothing to load in {str(folder)!r}")
    return cast(CheckpointFacts, facts), tensor_files.read(folder / STATISTICS)


def defaults_for(teachers: str) -> dict[str, str]:
    """`--SECTION.KEY` -> text of the default of every option that decides the result.

    `teachers` are names, separated by commas; a source has no default.
    """
    names = filter(None, teachers.split(","))
    rows = tuple(config.Teacher(name=name, source="timm:default") for name in names)
    texts = science(config.Config(teachers=rows)).items()
    return {f"--{name}": text for name, text in texts if not name.endswith(".source")}


def in_contents(facts: dict[str, Any], content_of: Mapping[str, str]) -> dict[str, Any]:
    """Facts with the hashes of weight files replaced by those of their tensors."""
    teachers = [[name, content_of.get(saved, saved)] for name, saved in facts.get("teachers") or ()]
    init = facts.get("init")
    init = init and {file: content_of.get(saved, saved) for file, saved in init.items()}
    return facts | {"teachers": teachers, "init": init}


def remove_old(folder: Path, newest: Path, keep: config.Run) -> None:
    """Remove the checkpoints that `keep` does not keep, and what interrupted saves left.

    Those after `newest` are of a branch that a roll-back abandoned. One that cannot be removed
    stays, without an error.
    """
    steps = steps_in(folder)
    branch = [step for step in steps if step.name <= newest.name]
    kept = {*branch[-keep.keep_last :], *best_of(branch, keep)}
    if keep.keep_every:
        kept |= {step for step in branch if int(step.name[5:]) % keep.keep_every == 0}
    for rest in (*folder.glob(".saving_*"), *folder.glob(".step_*.removed")):
        shutil.rmtree(rest, ignore_errors=True)
    for old in set(steps) - kept:
        with suppress(OSError):
            remove_folder(old)


def best_of(steps: list[Path], keep: config.Run) -> list[Path]:
    """The `keep.keep_best` checkpoints with the best `keep.best_by`; the newer of equals.

    Those without that value, such as those of steps without a probe, are not among the best.
    """
    costs = {}
    for step in reversed(steps) if keep.keep_best else ():
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged
            cost = cost_of(json.loads((step / FACTS).read_text()), keep.best_by)
            if math.isfinite(cost):
                costs[step] = cost
    return sorted(costs, key=costs.__getitem__)[: keep.keep_best]


def cost_of(facts: CheckpointFacts, by: str) -> float:
    """The training loss or a probed value of a checkpoint, so that less is better."""
    if by == "loss":
        return facts["loss"]
    row = facts["probe"][by]
    return -row["value"] if row["better"] == "higher" else row["value"]
