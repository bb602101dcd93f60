"""Distil teachers into a student: the entry point and the loop.

deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json [--recipe NAME] [--out DIR]
[--section.key value ...]
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    # The launcher puts this file's folder first on the path, where `data` or `log` would shadow
    # other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from unic_ds import config, ds_config, entry, job, optim, override

USAGE = """\
Distil frozen vision teachers into one ViT student.

  deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json                     the quickstart
  deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json --recipe unic_b --data.train DIR
  unic-ds train --ds_config ds_configs/zero2.json                                  the same in one
  process

The same command again resumes; a finished run prints its table."""
BALANCE = "balance/"
"""Before the balancer's entries among a checkpoint's statistics; no teacher's name has a slash."""


def main(argv: Sequence[str]) -> int:
    """Check the command line, then train; the exit code."""
    words, options = entry.parse(argv)
    if entry.wants_help(options):
        print(job.help_text(USAGE))
        return 0
    if words:
        raise ValueError(
            f"{words[0]!r} belongs to no option; write --name value, and quote a value with spaces"
        )
    task = job.resolve(options)
    if task.finished:
        return show(task)
    os.environ["HF_HUB_OFFLINE"] = (
        "1"  # a compute node must not ask a hub; `unic-ds teachers fetch` does
    )
    # Looked at before anything runs, when all ranks see the same.
    waiting = [stage for stage in (*task.before, task) if not stage.finished]
    for stage in waiting:
        announce(stage, task)
        if not distil(stage):
            break
    return 0


def announce(stage: job.Job, task: job.Job) -> None:
    """Say which stage of how many begins."""
    if task.before and os.environ.get("RANK", "0") == "0":
        number, student = [*task.before, task].index(stage) + 1, stage.cfg.student
        of = f"stage {number} of {len(task.before) + 1}"
        print(f"{of}: {student.model} at {student.size} px in {stage.out}", flush=True)


def show(task: job.Job) -> int:
    """Print the table of a finished run; the exit code."""
    from unic_ds.evaluate import table

    if os.environ.get("RANK", "0") == "0":
        print(f"{task.out} is finished (choose another --out to train again):\n")
        print(table.render(table.read(task.out / "results.json")))
    return 0


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens now."""
    return step % every == 0 or step == last


@dataclass
class Parts:
    """What the loop works with, in the order that a batch travels."""

    train: Any
    val: Any
    stream: Any
    teachers: Any
    cache: Any  # features of teachers that are not run, or None
    manifest: dict[str, Any]
    init: dict[str, str] | None
    engine: Any
    balance: Any
    steps: int
    flops: float


def distil(task: job.Job) -> bool:
    """Train until the last step, then export and evaluate; False where `run.stop_at` came first."""
    from unic_ds import dist, finish, log
    from unic_ds.engine import grad_norm
    from unic_ds.loss import distill_loss
    from unic_ds.ops import KERNELS

    dist.start()
    cfg, parts = task.cfg, build(task)
    judge = partial(
        distill_loss,
        loss=cfg.loss,
        balance=parts.balance,
        distances=cfg.distances,
        everyone=dist.gather_batch,
        ops=KERNELS[cfg.kernels],
    )
    engine, stream, teachers, last = parts.engine, parts.stream, parts.teachers, parts.steps
    first = resume(task, parts) + 1
    lock = record(task, parts.manifest)
    stop = min(cfg.run.stop_at or last, last)
    book = log.Log(
        task.out,
        steps=last,
        first=first,
        batch_size=cfg.optim.batch_size,
        flops_per_image=parts.flops,
    )
    with book:
        for step in range(first, stop + 1):
            rate = optim.learning_rate(step, cfg.optim, parts.train.per_epoch)
            optim.apply(engine.optimizer, rate)
            for _ in range(engine.gradient_accumulation_steps()):
                batch = next(stream)
                drop_TB, path_BK = uniforms(cfg, step, batch.position_B, engine)
                target = teachers(batch.images, batch.beside)
                pred = engine(batch.images[cfg.student.size], path_BK)
                loss, metrics = judge(pred, target, drop_TB)
                engine.backward(loss)
                engine.step()
                book.add(metrics)
            teachers.track(optim.momentum(step, cfg.standardise, last))
            parts.balance.track()
            if step == first:
                log.say(f"first optimiser step done {log.since_start():.0f} s after the start")
            saves = due(step, cfg.run.save_every, stop)
            if saves or due(step, cfg.run.log_every, stop):
                bad = len(stream.bad)
                row = book.write(
                    step, waited_s=stream.waited_s, bad=bad, lr=rate, grad_norm=grad_norm(engine)
                )
                refuse_non_finite(row)
            if saves:
                save(task, parts, step)
    stream.close()
    if stop == last:
        finish.finish(task, parts)
    lock.close()
    return stop == last


def uniforms(cfg: config.Config, step: int, position_B: Any, engine: Any) -> tuple[Any, Any]:
    """What decides teacher dropping (T, B) and drop path (B, K) at these places of the batch."""
    import torch

    from unic_ds import chance

    def to_device(values: Any) -> Any:
        tensor = torch.from_numpy(values).float()
        return (tensor.pin_memory() if engine.device.type == "cuda" else tensor).to(
            engine.device, non_blocking=True
        )

    place_B = position_B * (0 if cfg.drop.unit == "step" else 1)
    drop_BT = chance.uniform(cfg.seed, "teacher drop", len(cfg.teachers), step, place_B)
    path_BK = chance.uniform(cfg.seed, "drop path", len(engine.module.paths), step, position_B)
    return to_device(drop_BT.T.copy()), to_device(path_BK)


def build(task: job.Job) -> Parts:
    """Images, teachers, student and engine of a job."""
    from unic_ds import balance, dist, engine, initial, log
    from unic_ds.ladder import heads_of
    from unic_ds.ops import KERNELS
    from unic_ds.student import Student, grid_of
    from unic_ds.teachers.cache import FeatureCache
    from unic_ds.teachers.pool import Teachers

    cfg, device, ops = task.cfg, dist.device(), KERNELS[task.cfg.kernels]
    train, val = find_images(cfg)
    held_out = f", {len(val)} held out" if val else ""
    log.say(f"{len(train)} training images in {cfg.data.train}{held_out}")
    grid = grid_of(cfg.student)
    cache = FeatureCache(cfg.cache, cfg.teachers, draws_of(cfg, train)) if cfg.cache else None
    teachers = Teachers(
        cfg.teachers,
        grid=grid,
        standardise=cfg.standardise,
        device=device,
        ops=ops,
        cache=cache,
    )
    manifest = dist.share(teachers.manifest() if dist.rank() == 0 else None)
    for name, facts in manifest.items():
        log.say(f"teacher {name}: {facts['source']}, {facts['width']} wide, {facts['size']} px")
    heads = heads_of(cfg, teachers.widths)
    student = Student(cfg.student, cfg.ladder, heads, seed=cfg.seed, ops=ops).to(device)
    init = initial.start(task.init, student, teachers) if task.init else None
    flops = count_flops(student, teachers, cfg.student.size, device)
    cost = f"{flops / 1e9:.1f} GFLOP an image for the whole step"
    log.say(f"student {cfg.student.model}, {cfg.student.size} px; {cost}")
    return Parts(
        train=train,
        val=val,
        stream=open_stream(task, train, teachers.sizes, device, cache),
        teachers=teachers,
        cache=cache,
        manifest=manifest,
        init=init,
        engine=engine.build(student, cfg.optim, task.settings),
        balance=balance.build(cfg).to(device),
        steps=cfg.optim.step_count(train.per_epoch),
        flops=flops,
    )


def find_images(cfg: config.Config) -> tuple[Any, Any]:
    """Training and validation images (None where there are none), the same on every rank."""
    from unic_ds import data, dist

    with dist.in_turn():  # the first builds an index where there is none
        train, val = data.scan(cfg.data.train), None
        if cfg.data.val:
            val = data.scan(cfg.data.val).relabelled(train.classes)
    if cfg.data.val_share:
        train, val = data.split(train, cfg.data.val_share, cfg.seed)
    agree(train.fingerprint())
    return train, val


def draws_of(cfg: config.Config, train: Any) -> dict[str, Any]:
    """What the images and their augmentation depend on, but the seed."""
    from unic_ds import data
    from unic_ds.student import grid_of

    science = override.science(cfg)
    said: dict[str, Any] = {k: v for k, v in science.items() if k.startswith("data.")}
    said |= {"student.size": cfg.student.size, "grid": grid_of(cfg.student)}
    return said | {"images": train.fingerprint(), "decoder": data.backend(cfg.data)}


def open_stream(
    task: job.Job, train: Any, sizes: tuple[int, ...], device: Any, cache: Any = None
) -> Any:
    """This rank's batches of the training images, at the student's size and the teachers'.

    With a cache only its views are shown, and each batch brings their features.
    """
    from unic_ds import data, dist

    views = None
    if cache:
        views = data.Views(
            cache.seed, cache.views, lambda slots: cache.read(slots.index_B, slots.epoch_B)
        )
    return data.Stream(
        train,
        task.cfg.data,
        seed=task.cfg.seed,
        sizes=(task.cfg.student.size, *sizes),
        batch_size=task.cfg.optim.batch_size,
        micro=task.settings["train_micro_batch_size_per_gpu"],
        rank=dist.rank(),
        world=dist.world(),
        device=device,
        views=views,
    )


def agree(fingerprint: str) -> None:
    """RuntimeError unless every rank found the same images: their order is a function of them."""
    from unic_ds import dist

    if len(set(dist.gather_objects(fingerprint))) > 1:
        raise RuntimeError("the ranks see different images; wait until the folder is complete")


def record(task: job.Job, manifest: dict[str, Any]) -> IO[str]:
    """Write what the run is: config.yaml, teachers.json, ds_config.json; the folder's lock.

    ValueError where another job holds the lock.
    """
    import yaml

    from unic_ds import checkpoint, dist

    task.out.mkdir(parents=True, exist_ok=True)
    lock = (task.out / ".lock").open("a")
    if dist.rank() != 0:
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another job trains in {str(task.out)!r}; end it, or choose another --out"
        ) from None
    files = {
        "config.yaml": yaml.safe_dump(override.to_dict(task.cfg), sort_keys=False),
        "teachers.json": json.dumps(manifest, indent=1) + "\n",
        "ds_config.json": json.dumps(task.settings, indent=1) + "\n",
    }
    for name, text in files.items():
        checkpoint.write_whole(task.out / name, text)
    return lock


def count_flops(student: Any, teachers: Any, size: int, device: Any) -> float:
    """FLOPs of one image's step, counted: teachers forward, student forward, (twice) backward."""
    import torch

    from unic_ds.tracing import flop_counter

    images = {
        s: torch.zeros(1, 3, s, s, dtype=torch.uint8, device=device)
        for s in {size, *teachers.sizes}
    }
    totals = []
    for forward in (lambda: teachers.raw(images), lambda: student(images[size])):
        with torch.no_grad(), flop_counter() as counter:
            forward()
        totals.append(counter.get_total_flops())
    return totals[0] + 3 * totals[1]


def identity(task: job.Job, parts: Parts) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it."""
    from unic_ds import data, dist

    return {
        "images": parts.train.fingerprint(),
        "teachers": [[name, row["sha256"]] for name, row in parts.manifest.items()],
        "init": parts.init,
        "feature cache": parts.cache.identity if parts.cache else None,
        "decoder": data.backend(task.cfg.data),
        "ranks": dist.world(),
        "zero_stage": ds_config.stage(task.settings),
        "bf16": bool(task.settings.get("bf16", {}).get("enabled")),
        **{f"--{key}": value for key, value in override.science(task.cfg).items()},
    }


def save(task: job.Job, parts: Parts, step: int) -> None:
    """Save a checkpoint after `step`."""
    from unic_ds import checkpoint

    checkpoint.save(
        parts.engine,
        task.out / "checkpoints",
        step,
        facts=identity(task, parts)
        | {"samples": step * task.cfg.optim.batch_size, "seed": task.cfg.seed},
        statistics=parts.teachers.state_dict()
        | {f"{BALANCE}{k}": v for k, v in parts.balance.state_dict().items()},
        keep=task.cfg.run.keep_last,
    )


def resume(task: job.Job, parts: Parts) -> int:
    """Load the newest whole checkpoint, if there is one; the step it was saved after, else 0."""
    from unic_ds import checkpoint, log

    found = checkpoint.find(task.out / "checkpoints", task.resume)
    step = 0
    if found:
        facts, statistics = checkpoint.load(parts.engine, found, identity(task, parts))
        ours = {k: statistics.pop(k) for k in list(statistics) if k.startswith(BALANCE)}
        parts.balance.load_state_dict({k.removeprefix(BALANCE): v for k, v in ours.items()})
        parts.teachers.load_state_dict(statistics)
        step = facts["step"]
        log.say(f"resumed after step {step} from {found}")
    elif task.cfg.standardise.fitted:
        fit_statistics(task, parts)
    parts.stream.seek(step)
    return step


def fit_statistics(task: job.Job, parts: Parts) -> None:
    """Fix the targets' statistics by the first batches of the run, which training reads again."""
    from unic_ds import dist, log

    steps, start = task.cfg.standardise.fit_steps, time.monotonic()
    images = steps * task.cfg.optim.batch_size
    log.say(f"fitting the teachers' statistics to {images} images ({steps} batches)")
    count = steps * parts.engine.gradient_accumulation_steps()
    # A stream of its own: the log's share of time spent waiting is of training alone.
    teachers = parts.teachers
    stream = open_stream(task, parts.train, teachers.sizes, dist.device(), parts.cache)
    tokens = (teachers.raw(batch.images, batch.beside) for batch in islice(stream, count))
    teachers.fit(log.track(tokens, count, "statistics"))
    stream.close()
    log.say(f"statistics fitted in {time.monotonic() - start:.1f} s")


def refuse_non_finite(row: dict[str, Any]) -> None:
    """RuntimeError where the loss is no number any more: going on would burn the job."""
    if not math.isfinite(row["loss"]):
        raise RuntimeError(
            f"the loss is {row['loss']} at step {row['step']}; lower --optim.lr or set"
            " --optim.clip in a fresh --out (earlier checkpoints are kept)"
        )


if __name__ == "__main__":
    sys.exit(entry.run(main, sys.argv[1:]))
