"""Train several jobs in the processes of one launch, and note the weights that each began with.

Usage: `deepspeed tests/support/noted_runs.py PLAN.json`, a list of command lines; every run
folder gets a `weights.json`.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from unic_ds import dist, train
from unic_ds.config import job
from unic_ds.config.args import parse
from unic_ds.engine import deepspeed_engine


def digest(made) -> str:
    """SHA-256 of every weight as the engine holds it, gathered over its ranks."""
    total = hashlib.sha256()
    for name, value in sorted(deepspeed_engine.weights(made, "").items()):
        total.update(name.encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def watched(build, found: list[str]):
    """`engine.build` that also notes the digest of what it built."""

    def noting(*given):
        made = build(*given)
        found.append(digest(made))
        return made

    return noting


if __name__ == "__main__":
    plan = next(word for word in sys.argv[1:] if not word.startswith("--"))
    build = deepspeed_engine.build
    for arguments in json.loads(Path(plan).read_text()):
        found: list[str] = []
        deepspeed_engine.build = watched(build, found)
        code = train.main(arguments)
        if code:
            sys.exit(code)
        out = job.resolve(parse(arguments)[1]).out
        dist.barrier()
        if dist.rank() == 0:
            (out / "weights.json").write_text(json.dumps(found))
            for shards in out.glob("checkpoints/*/zero"):
                shutil.rmtree(shards)  # room for the runs to come
        dist.barrier()
