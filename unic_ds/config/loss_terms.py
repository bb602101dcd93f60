"""A distance between tokens, as text: `0.9 cosine + 0.1 smooth_l1`. Stdlib only."""

from __future__ import annotations

import re

TERMS = ("cosine", "smooth_l1", "mse", "contrastive")
TERM = re.compile(r"(?:(\d+(?:\.\d*)?|\.\d+)\s*\*?\s*)?([a-z_0-9]+)")


def parse(text: str, name: str, *, known: tuple[str, ...] = TERMS) -> dict[str, float]:
    """Term -> weight; nothing for `none`. ValueError, naming the option, for anything else."""
    if text.strip() == "none":
        return {}
    weights: dict[str, float] = {}
    for part in text.split("+"):
        found = TERM.fullmatch(part.strip())
        if not found or found[2] not in known or found[2] in weights:
            raise ValueError(
                f"{name} must be none or weighted terms like '0.9 cosine + 0.1 smooth_l1'"
                f" of {', '.join(known)}, each once, got {text!r}"
            )
        weights[found[2]] = float(found[1] or 1)
    if not any(weights.values()):
        raise ValueError(f"{name} must have a weight above 0 (or be none), got {text!r}")
    return weights
