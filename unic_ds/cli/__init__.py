"""`unic-ds VERB`: everything around a run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from unic_ds import train
from unic_ds.config import EIGHT_BITS, Config, args, check, job, recipes
from unic_ds.config.overrides import coerce, nearest
from unic_ds.files.printable import printable
from unic_ds.process import entry_point

USAGE = """\
unic-ds VERB [--option value ...]

  train             train in one process: --ds_config F [--recipe R]; many ranks: deepspeed
  unic_ds/train.py
  check             whether a training command would be refused in its first minute, without
  training, in about 10 s: train's options and --ranks N
  teachers check    run an image through each teacher: tokens, widths, grid, preprocessing, licence,
  SHA-256
                    --precision int8|fp8|int8_dynamic|fp8_dynamic: how near their tokens stay to
  those in bf16, on real images; exit code 1 below a mean cosine of .998
  teachers fetch    download the teachers' weights (on a machine that reaches the hub)
  plan              memory, traffic and time of a run before it is queued: --recipe R --gpus 64
  --gpu h100-80 [--ds_config F] [--search] [--images N] [--efficiency student=0.4,...] [--json];
  exit code 1 where it does not fit
  doctor            check this node (under a launcher: all) before a run: [--recipe R]
  [--ds_config F] [--out DIR] [--json]; exit code 1 where a run would fail
  doctor RUN        what happened to a run, and what to do: [--hash] [--json]
  pack              images as tar shards with an index: pack SRC OUT [--shard_mb 512]
  [--max_side N] [--workers N] [--seed 0]; SRC is anything that --data.train takes
  pack verify OUT   prove a pack whole: checksums, headers, index
  cache             store what a recipe's teachers say of drawn views: cache OUT --recipe R
  [--views V] [--dtype bf16|int8] [--batch B] [--yes]; then train with --teachers.cache OUT
  export            bare encoder of a run's newest checkpoint: --run DIR [--out DIR]
  import-unic       a published checkpoint as a model folder: import-unic PATH OUT
  quickstart        prepare the demonstration's teachers and images

  --recipe R        quickstart, unic_b, unic_l, unic_g or a .yaml file; --section.key value
  overrides it
  --json            one JSON object for programs, where a verb prints a table
  unic-ds VERB --help"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and leave with its exit code."""
    words = sys.argv[1:] if argv is None else argv
    entry_point.start(verb, words, trains=words[:1] == ["train"])


def verb(argv: Sequence[str]) -> int:
    """Find the verb of a command line and call it; the exit code."""
    if argv and argv[0] == "train":
        return train.main(argv[1:])
    words, options = args.parse(argv)
    name = " ".join(words)
    if not words or args.wants_help(options):
        print(USAGE)
        return 0
    if words[0] in WITH_PATHS:
        return WITH_PATHS[words[0]](words[1:], options)
    if name not in VERBS:
        verbs = ["train", *WITH_PATHS, *VERBS]
        raise ValueError(
            f"unknown verb {name!r}{nearest(name, verbs)}; there are {', '.join(verbs)}"
        )
    return VERBS[name](options)


def take(options: dict[str, str], *names: str) -> dict[str, str]:
    """Those options, removed from `options`."""
    return {name: options.pop(name) for name in names if name in options}


def configured(options: dict[str, str]) -> Config:
    """The Config of `--recipe` and overrides."""
    cfg = job.configure(take(options, "recipe").get("recipe", "quickstart"), options)
    job.prepare_demonstration(cfg)
    return cfg


def check_command(options: dict[str, str]) -> int:
    """Refuse what train would refuse before its first step, in seconds and on a lone process."""
    ranks = int(coerce(int, take(options, "ranks").get("ranks", "1"), "--ranks"))
    check(ranks > 0, "--ranks", "positive", ranks)
    task = job.resolve(options, ranks=ranks)
    if not task.finished:
        os.environ["HF_HUB_OFFLINE"] = "1"  # as for the trainer: nothing is downloaded
        from unic_ds.training import acceptance

        acceptance.accept(train.waiting(task))
    stands = "is finished" if task.finished else f"can be trained by {ranks} ranks"
    print(f"{task.cfg.recipe} in {task.out} {stands}")
    return 0


def quickstart(options: dict[str, str]) -> int:
    """Prepare the demonstration."""
    from unic_ds import demo as demonstration

    if options:
        raise ValueError(f"unknown option --{next(iter(options))}; quickstart takes none")
    print(f"ready: {demonstration.prepare()}")
    return 0


def teachers_check(options: dict[str, str]) -> int:
    """Describe every teacher of a recipe from a real forward."""
    as_json, own = bool(take(options, "json")), take(options, "precision")
    cfg = configured(options)
    from unic_ds import dist
    from unic_ds.models.encoder import grid_of
    from unic_ds.teachers.teacher_set import describe

    if own:
        return fidelity(cfg, own["precision"], as_json)
    rows = describe(cfg.teachers, grid=grid_of(cfg.student), device=dist.device())
    show(rows, as_json)
    if wrong := [row["name"] for row in rows if not row["finite"]]:
        raise RuntimeError(f"tokens of {', '.join(wrong)} are not finite; leave such teachers out")
    return 0


def fidelity(cfg: Config, asked: str, as_json: bool) -> int:
    """Show how near teachers of eight bits stay to bf16; RuntimeError where one does not."""
    from unic_ds import dist
    from unic_ds.models.encoder import grid_of
    from unic_ds.teachers import quantisation, teacher_set

    known = asked in EIGHT_BITS
    check(known, "--precision", f"one of {', '.join(EIGHT_BITS)}", asked)
    changed: Any = {"precision": asked, "placement": "replicate"}
    rows = tuple(replace(row, **changed) for row in cfg.teachers)
    sample, said = judges(cfg)
    found = teacher_set.fidelities(
        rows, grid=grid_of(cfg.student), device=dist.device(), sample=sample
    )
    show([row | {"images": said} for row in found], as_json)
    for row in found:
        quantisation.check_agreement(row["name"], asked, row)
    return 0


def judges(cfg: Config) -> tuple[Any, str]:
    """Images to judge teachers by, at a side in pixels, and what they are of."""
    from unic_ds import data, demo
    from unic_ds.training import setup

    where = cfg.data.train
    if not where and demo.ready():
        where = str(demo.root() / demo.PARTS[0])
    if where:
        with redirect_stdout(sys.stderr):  # what a scan says is no part of a table or of JSON
            return setup.sample_images(cfg, data.scan(where)), where
    return setup.noise_images, "noise, for there are no images; give --data.train"


def teachers_fetch(options: dict[str, str]) -> int:
    """Download what a recipe's teachers need, with sizes and hashes."""
    as_json = bool(take(options, "json"))
    cfg = configured(options)
    from unic_ds.teachers.sources import fetch

    show([{"name": row.name, "source": row.source} | fetch(row) for row in cfg.teachers], as_json)
    return 0


def export(options: dict[str, str]) -> int:
    """Export the bare encoder of a run's newest whole checkpoint, of the stage that it is in."""
    given = take(options, "run", "out")
    if options or "run" not in given:
        wrong = f"unknown option --{next(iter(options))}; " if options else ""
        raise ValueError(
            f"{wrong}export needs --run DIR (a run folder), and may have --out DIR (a new folder)"
        )
    cfg, run = begun(Path(given["run"]))
    import torch

    from unic_ds import data
    from unic_ds.engine import reshard
    from unic_ds.models.encoder import build_encoder
    from unic_ds.models.ladder import heads_of
    from unic_ds.models.student import ladder_on
    from unic_ds.training import checkpoint, final_eval
    from unic_ds.weights import warm_start
    from unic_ds.weights.export import export as write

    found = checkpoint.find(run / "checkpoints", "auto")
    if found is None:
        raise ValueError(f"--run {str(run)!r} holds no checkpoint yet")
    parts: dict[str, dict[str, Any]] = {"encoder": {}, "ladder": {}}
    for name, value in reshard.weights(found / checkpoint.SHARDS).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    teachers = json.loads((run / "teachers.json").read_text())
    with torch.device("meta"):  # for the names alone
        heads = heads_of(cfg, {name: row["width"] for name, row in teachers.items()})
        ladder = ladder_on(build_encoder(cfg.student), cfg.ladder, heads)
    with redirect_stdout(sys.stderr):  # a script reads the exported folder's path
        images = final_eval.sample_images(data.scan(cfg.data.train), cfg, 8)
    statistics = warm_start.read(found / checkpoint.STATISTICS)
    beside = {
        warm_start.LADDER: ladder.export_state_dict(parts["ladder"]),
        warm_start.STATISTICS: {k: v for k, v in statistics.items() if k.split(".")[0] in teachers},
    }
    out = Path(given.get("out", run / "encoders" / found.name))
    print(write(parts["encoder"], cfg, images, out, teachers=teachers, beside=beside))
    return 0


def begun(run: Path) -> tuple[Config, Path]:
    """(settings, folder) of a run's last stage that has a checkpoint, or else of the run."""
    stages = job.staged(recipes.read(run / "config.yaml"), run)
    saved = [stage for stage in stages if any((stage[1] / "checkpoints").glob("step_*"))]
    return (saved or stages)[-1]


def import_unic(words: list[str], options: dict[str, str]) -> int:
    """Write a published checkpoint as a model folder."""
    if options or len(words) != 2:
        wrong = f"unknown option --{next(iter(options))}; " if options else ""
        raise ValueError(
            f"{wrong}import-unic needs PATH (a published checkpoint) and OUT (a new folder)"
        )
    from unic_ds.weights import import_unic as published

    print(printable(published.import_unic(Path(words[0]), Path(words[1])), 4096))
    return 0


def cache(words: list[str], options: dict[str, str]) -> int:
    """Store the teachers' features of drawn views."""
    own = take(options, "views", "dtype", "yes", "batch")
    if len(words) != 1:
        raise ValueError("cache needs OUT, a folder for the features, for example cache features")
    views, batch = (
        int(coerce(int, own.get(name, default), f"--{name}"))
        for name, default in (("views", "1"), ("batch", "32"))
    )
    dtype = own.get("dtype", "bf16")
    for name, value in (("views", views), ("batch", batch)):
        check(value > 0, f"--{name}", "positive", value)
    check(dtype in ("bf16", "int8"), "--dtype", "bf16 or int8", dtype)
    cfg = configured(options)
    if not cfg.teachers or not cfg.data.train:
        raise ValueError("cache needs teachers and --data.train; a --recipe may have both")
    from unic_ds.training.build_cache import store

    store(cfg, Path(words[0]), views=views, dtype=dtype, yes="yes" in own, batch=batch)
    return 0


def pack(words: list[str], options: dict[str, str]) -> int:
    """Write a source as tar shards, or prove a pack whole."""
    own = take(options, "shard_mb", "max_side", "workers", "seed")
    wrong = f"unknown option --{next(iter(options))}; " if options else ""
    if wrong or len(words) != 2 or (words[0] == "verify" and own):
        raise ValueError(
            f"{wrong}pack needs SRC and OUT (a new folder), or verify and OUT (a pack); options are"
            " --shard_mb --max_side --workers --seed"
        )
    shard_mb = float(coerce(float, own.get("shard_mb", "512"), "--shard_mb"))
    max_side, workers, seed = (
        int(coerce(int, own.get(name, "0"), f"--{name}"))
        for name in ("max_side", "workers", "seed")
    )
    check(shard_mb > 0, "--shard_mb", "positive", shard_mb)
    for name, value in (("max_side", max_side), ("workers", workers), ("seed", seed)):
        check(value >= 0, f"--{name}", ">= 0", value)
    from unic_ds import data
    from unic_ds.data import pack, verify

    if words[0] == "verify":
        print(verify.verify(Path(words[1])))
        return 0
    settings = pack.Settings(shard_mb=shard_mb, max_side=max_side, seed=seed)
    print(pack.pack(data.scan(words[0]), Path(words[1]), settings, workers=workers))
    return 0


def plan(options: dict[str, str]) -> int:
    """What a run needs, and whether it fits."""
    from unic_ds.planning import search

    own = take(options, *search.VERB_OPTIONS)
    take(options, "out", "resume")  # a training command is planned as it stands
    cfg = job.configure(take(options, "recipe").get("recipe", "quickstart"), options)
    return search.run(own, cfg)


def doctor(words: list[str], options: dict[str, str]) -> int:
    """Whether a node could run what is asked, or what became of a run."""
    if len(words) > 1:
        raise ValueError(f"doctor takes one run folder at most, got {' '.join(words)!r}")
    if words:
        own = take(options, "hash", "json")
        if options:
            raise ValueError(f"unknown option --{next(iter(options))}; there are --hash --json")
        from unic_ds.doctor import postmortem

        return postmortem.run(Path(words[0]), hashes="hash" in own, as_json="json" in own)
    from unic_ds.doctor import preflight as node

    own = take(options, *node.VERB_OPTIONS)
    options.pop("local_rank", None)  # the deepspeed launcher adds it
    cfg = job.configure(take(options, "recipe").get("recipe", "quickstart"), options)
    return node.run(own, cfg)


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows as a table for people or one JSON object for programs."""
    if as_json:
        print(json.dumps({row["name"]: row for row in rows}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # foreign text may look like rich's markup

    for row in rows:
        title = Text(printable(row["name"]))
        grid = Table(show_header=False, title=title, title_justify="left", box=None)
        for key, value in row.items():
            if key != "name":
                grid.add_row(key, Text(printable(value)))
        Console(soft_wrap=True).print(grid)


VERBS = {
    "check": check_command,
    "teachers check": teachers_check,
    "teachers fetch": teachers_fetch,
    "export": export,
    "plan": plan,
    "quickstart": quickstart,
}
WITH_PATHS = {"cache": cache, "doctor": doctor, "import-unic": import_unic, "pack": pack}
