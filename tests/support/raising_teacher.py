"""A teacher that raises: RAISES=RANK:CALL:ERROR, a rank or all, a number, a built-in exception."""

import builtins
import logging
import os
import warnings

from small_teacher import Small


class Raising(Small):
    """Small until the call."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        rank, call, error = os.environ.get("RAISES", "all:0:KeyError").split(":")
        if rank in ("all", os.environ.get("RANK")) and self.calls == int(call):
            raise vars(builtins)[error]("no pos_embed\x1b[2J")
        return super().forward(images)


def build():
    """The teacher; libraries warn as it is built."""
    warnings.warn("odd weights", stacklevel=2)
    logging.getLogger("library").warning("odd keys")
    return Raising(24)
