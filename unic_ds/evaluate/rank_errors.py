"""An error of one rank ends all of them by one sentence, so that none waits in a collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unic_ds import dist
from unic_ds.process import entry_point


@contextmanager
def raised_on_all_ranks(task: str, remedy: str) -> Iterator[None]:
    """Context manager of local work: RuntimeError on every rank if the body fails on one.

    Every rank enters it, and the body has no collectives. `task` and `remedy` are reported if a
    GPU's memory does not suffice: "out of GPU memory in the linear probe; lower --eval.max_train".
    """
    problem = ""
    try:
        yield
    except torch.OutOfMemoryError:
        problem = f"out of GPU memory in {task}; {remedy}"
    except (OSError, RuntimeError, ValueError) as error:
        if not entry_point.is_expected(error):
            raise
        problem = str(error)
    if dist.all_reduce_sum(torch.tensor(int(bool(problem)))):
        raise RuntimeError(next(filter(None, dist.all_gather_objects(problem))))
