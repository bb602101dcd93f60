"""Ladder of projectors of one kind of token; `op.py` has the maths and the public function."""

from unic_kernels.ladder.arguments import RECOMPUTE
from unic_kernels.ladder.op import ladder_projection
from unic_kernels.ladder.ref import ladder_projection_ref

__all__ = ["RECOMPUTE", "ladder_projection", "ladder_projection_ref"]
