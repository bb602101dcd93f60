"""CPU time and memory of each task of `unic-ds eval`, as a table in Markdown.

    python tests/support/task_costs.py RUN SETS    after "Try it" of docs/evaluation.md

Each task is a command of its own on the student of RUN and its teachers, without cached features.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from unic_ds.config.evaluation import TASKS

FOLDERS = {
    "transfer": "transfer",
    "transfer_knn": "transfer",
    "segmentation": "ade20k",
    "depth": "nyu",
    "detection": "coco",
    "correspondence": "spair",
}
"""Folder of SETS for a task; `classes` for the others."""
NEEDS_CLASSIFIER = "plugplay"  # which these teachers do not have


def costs(run: str, sets: Path) -> Iterator[tuple[str, float, float]]:
    """Task, CPU seconds and peak memory in GB, imports included."""
    for task in (task for task in TASKS if task != NEEDS_CLASSIFIER):
        words = ["unic-ds", "eval", task, "--models", f"{run},clip,effnet"]
        words += [
            "--plugins",
            "caption_tower",
            "--eval.data",
            str(sets / FOLDERS.get(task, "classes")),
        ]
        words += ["--eval.size", "64", "--eval.head_images", "64", "--eval.cache", "none"]
        pid = os.spawnvp(os.P_NOWAIT, words[0], words)
        _, status, used = os.wait4(pid, 0)
        if status:
            sys.exit(f"task_costs: {' '.join(words)} failed")
        yield task, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Measure, and print the table."""
    rows = list(costs(sys.argv[1], Path(sys.argv[2])))
    print("| task | CPU seconds | peak memory |\n|---|---|---|")
    for task, cpu, memory in rows:
        print(f"| `{task}` | {cpu:.0f} | {memory:.1f} GB |")


if __name__ == "__main__":
    main()
