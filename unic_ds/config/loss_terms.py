"""A distance between tokens, as text: `0.9 cosine + 0.1 smooth_l1`. Stdlib only."""

from __future__ import annotations

import re

from unic_ds.files.printable import printable

TERMS = ("cosine", "smooth_l1", "mse", "contrastive", "dispersion", "relational")
"""The built-in terms."""

CLS_ONLY = ("contrastive", "dispersion", "relational")
"""Terms for CLS tokens only."""

OF_ALL_IMAGES = ("contrastive", "dispersion", "relational")
"""Terms that compare an image with the targets of others, or learn from the targets of all."""

TERM = re.compile(r"(?:(\d+(?:\.\d*)?|\.\d+)\s*\*?\s*)?([a-z][a-z_0-9]*)")


def parse(text: str, option: str, *, cls: bool) -> dict[str, float]:
    """Term -> weight; {} for `none`. ValueError, naming the option, for anything else.

    `cls`: for CLS tokens, not patch tokens. Names are checked against the registry of terms later.
    """
    if text.strip() == "none":
        return {}
    weights: dict[str, float] = {}
    for part in text.split("+"):
        found = TERM.fullmatch(part.strip())
        if not found or found[2] in weights or found[2] == "none":
            raise ValueError(
                f"{option} must be none or weighted terms, each once, like '0.9 cosine + 0.1"
                f" smooth_l1', got {printable(repr(text))}"
            )
        if found[2] in CLS_ONLY and not cls:
            raise ValueError(
                f"{option} must have no {found[2]}, which is a term of CLS tokens alone, got"
                f" {printable(repr(text))}"
            )
        weights[found[2]] = float(found[1] or 1)
    if not any(weights.values()):
        raise ValueError(f"{option} must have a weight above 0 (or be none), got {text!r}")
    return weights
