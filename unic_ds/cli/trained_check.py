"""Command that trains small students without each teacher, to check a comparison of teachers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from unic_ds.config import Config
from unic_ds.config.ablations import SMALL
from unic_ds.config.overrides import flatten, split_teachers, to_dict

NOT_SMALL = re.compile(r"seed|run\.extend|teachers\..*\.rungs")
"""Options that a grid sets itself, or that are of another student's blocks."""


def command(overrides: Mapping[str, str], cfg: Config, chosen: Sequence[str]) -> str:
    """The `unic-ds ablate teachers` command for the chosen teachers of a comparison.

    `overrides` are the recipe and options of the comparison, and `cfg` is their Config. It is of
    all teachers if one alone was chosen.
    """
    flat = flatten(to_dict(cfg))
    options = {name: text for name, text in overrides.items() if not NOT_SMALL.fullmatch(name)}
    options |= {name: text for name, text in SMALL.items() if flat[name] != text}
    names = [row.name for row in cfg.teachers]
    words = split_teachers(overrides.get("teachers", "")) or names
    if 1 < len(chosen) < len(names) == len(words):  # a method may have made other teachers of them
        kept = [word for name, word in zip(names, words, strict=True) if name in chosen]
        others = tuple(f"teachers.{name}." for name in names if name not in chosen)
        options = {name: text for name, text in options.items() if not name.startswith(others)}
        options["teachers"] = ",".join(kept)
    if not (cfg.data.val or cfg.data.val_share or cfg.eval.data):
        options["data.val_share"] = "0.25"
    pairs = [word for name, text in options.items() for word in (f"--{name}", text)]
    return shlex.join(["unic-ds", "ablate", "teachers", "--seeds", "0,1", "--tasks", "knn", *pairs])
