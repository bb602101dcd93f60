"""Train stages, and count what torch.compile makes in each: `counted_stages.py OUT [options]`."""

import json
import sys
from pathlib import Path

import torch

from unic_ds import train
from unic_ds.training import loop


def main(out: Path, argv: list[str]) -> int:
    """Write how many graphs each stage compiled, its evaluation with it."""
    graphs: list[int] = []
    run_stage, stats = loop.run_stage, torch._dynamo.utils.counters["stats"]

    def counting(*given, **more):
        before = stats["unique_graphs"]
        done = run_stage(*given, **more)
        graphs.append(stats["unique_graphs"] - before)
        return done

    loop.run_stage = counting
    code = train.main(argv)
    out.write_text(json.dumps(graphs))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
