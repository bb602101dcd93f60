"""Ranks and what they exchange: the only module that knows torch.distributed.

Without a launcher a process is rank 0 of 1 and every exchange is the identity.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d

from unic_ds import files
from unic_ds.process import interrupt, node, rendezvous

LOG = logging.getLogger("unic_ds.dist")
TIMEOUT_S = 1800
REFUSAL_S = 300.0
"""Seconds that a rank whose node is unfit waits for the others, to end them too."""
READ_S = 10.0
"""Seconds that rank 0 waits for the others to read why all end."""
ALLOWED = frozenset(os.sched_getaffinity(0))
"""CPU cores that this process may use, before it is bound to those near its GPU."""

T = TypeVar("T")

# torch 2.14 renamed it, and warns about the old name.
all_gather_single = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor


def rank() -> int:
    """This process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many processes share this node; 1 where no launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def device() -> torch.device:
    """This rank's device: its GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def cores() -> int:
    """CPU cores this rank may keep busy: its share of what the process is allowed."""
    return max(1, len(ALLOWED) // local_world())


def start(timeout_s: int | None = None) -> None:
    """Join the process group of the launcher's environment; a lone process makes its own.

    No collective waits longer than `timeout_s` (1800). node.Unfit, on all ranks, where a node lacks
    the GPUs that it should have, or where the ranks' devices or software do not go together.
    """
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ.setdefault(name, value)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    if td.is_initialized():
        if timeout_s:
            set_timeout(timeout_s)
        return
    facts = node.facts(local_rank(), local_world())
    if facts.device == "cuda" and not facts.fault:
        use_gpu()
    atexit.register(stop)
    timeout_s = timeout_s or TIMEOUT_S
    join("cpu:gloo,cuda:nccl" if facts.device == "cuda" else "gloo", facts, timeout_s)
    set_timeout(timeout_s)


def use_gpu() -> None:
    """Give this rank its GPU, the precision that is asked for there, and the cores beside it."""
    torch.cuda.set_device(local_rank())
    # What is asked for in fp32 is computed in it, and bf16 products are summed in fp32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    near = node.cores_near(local_rank(), ALLOWED)
    if len(near) >= cores():  # threads that start from here on stay there too
        os.sched_setaffinity(0, near)


def join(backend: str, facts: node.Facts, timeout_s: int) -> None:
    """Meet the other ranks, compare nodes with them, and make the process group of all."""
    if world() == 1 and "MASTER_PORT" not in os.environ:
        refuse(*node.judge([facts]))
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)
        return
    timeout, file = timedelta(seconds=timeout_s), rendezvous.file()
    try:
        store = meet(file, timeout) if file else environment_store(timeout)
        compare(td.PrefixStore("nodes", store), facts, timeout)
        td.init_process_group(
            backend,
            store=td.PrefixStore("default_pg", store),
            rank=rank(),
            world_size=world(),
            timeout=timeout,
        )
    except td.DistNetworkError as error:
        raise RuntimeError(
            f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            f" ({str(error).split(':')[-1].strip()}); give the launcher another --master_port"
        ) from error
    if file:
        file.unlink(missing_ok=True)  # all have met


def environment_store(timeout: timedelta) -> td.Store:
    """The store at the address that the launcher gives."""
    store, _, _ = next(td.rendezvous("env://", rank(), world(), timeout=timeout))
    store.set_timeout(timeout)
    return store


def compare(store: td.Store, mine: node.Facts, timeout: timedelta) -> None:
    """Raise node.Unfit on all ranks where their nodes cannot train together; rank 0 judges.

    A rank whose own node is unfit does not wait long for the others.
    """
    patience = timedelta(seconds=REFUSAL_S) if mine.fault else timeout
    try:
        store.set(f"facts {rank()}", json.dumps(asdict(mine)))
        if rank() == 0:
            keys = [f"facts {number}" for number in range(world())]
            store.wait(keys, patience)
            rows = [node.Facts(**json.loads(store.get(key))) for key in keys]
            if says := node.mixture(rows):
                LOG.warning("%s", says)
            store.set("verdict", json.dumps(node.judge(rows)))
        store.wait(["verdict"], patience)
    except (td.DistStoreError, td.DistNetworkError) as error:
        refuse(mine.fault, [mine.host])
        if isinstance(error, td.DistNetworkError):
            raise RuntimeError("rank 0 ended before all ranks had met; it says why") from None
        raise TimeoutError(
            f"not all ranks started within {timeout.total_seconds():.0f} s"
        ) from None
    says, nodes = json.loads(store.get("verdict"))
    if not says:
        return
    store.add("read", 1)
    last = time.monotonic() + READ_S
    while rank() == 0 and store.add("read", 0) < world() and time.monotonic() < last:
        time.sleep(0.05)  # the store ends with this process
    refuse(says, nodes)


def refuse(says: str, nodes: Sequence[str]) -> None:
    """Raise node.Unfit where there is something to say."""
    if says:
        raise node.Unfit(says, nodes)


def set_timeout(seconds: int) -> None:
    """Give every process group, made or to come, one timeout.

    Groups that DeepSpeed and FSDP make have torch's default (30 minutes with gloo beside NCCL), not
    that of the group of all ranks, and neither library passes a timeout on.
    """
    timeout = timedelta(seconds=seconds)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    change = getattr(td, "set_timeout", None) or c10d._set_pg_timeout  # since torch 2.14; before
    for group in list(c10d._world.pg_map):
        change(timeout, group)


def meet(file: Path, timeout: timedelta) -> td.Store:
    """A store at a free port of this machine, which rank 0 writes to `file` for the others.

    TimeoutError where it does not.
    """
    host = os.environ["MASTER_ADDR"]
    if rank() == 0:
        store = td.TCPStore(host, 0, world(), True, timeout, wait_for_workers=False)
        files.write_whole(file, str(store.port))
        os.environ["MASTER_PORT"] = str(store.port)
        return store
    last = time.monotonic() + timeout.total_seconds()
    while not file.exists():
        if time.monotonic() > last:
            raise TimeoutError(f"rank 0 did not start within {timeout.total_seconds():.0f} s")
        time.sleep(0.05)
    os.environ["MASTER_PORT"] = files.read_text(file)
    return td.TCPStore(host, int(os.environ["MASTER_PORT"]), world(), False, timeout)


def stop() -> None:
    """Leave the process group."""
    if td.is_initialized():
        td.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if td.is_initialized() and world() > 1:
        td.barrier()


@contextmanager
def local_main_first() -> Iterator[None]:
    """Each node's first rank runs the body before its others: one reads disk, they its cache."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def all_gather(values: Tensor) -> Tensor:
    """`values` of every rank, stacked on a first axis in rank order; the same on all ranks."""
    if world() == 1:
        return values[None]
    found = values.new_empty(world(), *values.shape)
    all_gather_single(found.view(-1), values.contiguous().view(-1))
    return found


def all_gather_batch(values_BC: Tensor) -> tuple[Tensor, int]:
    """Equally many rows of every rank in rank order, and where this rank's begin."""
    return all_gather(values_BC).flatten(0, 1), rank() * len(values_BC)


def all_reduce_sum(values: Tensor) -> Tensor:
    """`values` summed over the ranks; the same on all."""
    if world() == 1:
        return values
    summed = values.clone()
    td.all_reduce(summed)
    return summed


def gather_to_rank(values: Tensor, owner: int) -> Tensor | None:
    """`values` of every rank, stacked on a first axis in rank order, on `owner`; None elsewhere."""
    if world() == 1:
        return values[None]
    values = values.contiguous()
    found = values.new_empty(world(), *values.shape) if rank() == owner else None
    td.gather(values, None if found is None else list(found), dst=owner)
    return found


def all_gather_objects(value: Any) -> list[Any]:
    """`value` of every rank in rank order; small things off the hot path."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    td.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if world() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_0(find: Callable[[], T]) -> T:
    """Return what `find` returns on rank 0, on every rank; its ValueError is raised on all."""
    found, problem = None, ""
    try:
        found = find() if rank() == 0 else None
    except ValueError as error:
        problem = str(error)
    found, problem = broadcast_object((found, problem))
    if problem:
        raise ValueError(problem)
    return cast(T, found)


def shard_over_node(module: nn.Module, blocks: Sequence[nn.Module], *, offload: bool) -> None:
    """Keep a node's share of a frozen module's weights on each of its ranks, by FSDP2.

    A block's are gathered for its forward, the rest for the module's. `offload` keeps the share in
    the CPU's memory. Every rank of the node calls this, and then each forward.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    start()
    cuda = device().type == "cuda"
    where = CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy()
    for part in (*blocks, module):
        fully_shard(part, mesh=node_mesh(), reshard_after_forward=True, offload_policy=where)


@cache
def node_mesh() -> Any:
    """The ranks of this node; made once, for each has communicators of its own."""
    from torch.distributed.device_mesh import init_device_mesh

    inside = local_world() if world() % local_world() == 0 else world()
    shape, names = (world() // inside, inside), ("nodes", "node")
    return init_device_mesh(device().type, shape, mesh_dim_names=names)["node"]


class Agreed(NamedTuple):
    """What all ranks do after a step."""

    stop: bool  # save, and end the run
    save: bool  # save at the next log line


class StepVotes:
    """Whether the run stops after a step, and whether it is time to save; the same on all ranks.

    Any rank stops a run by a signal, rank 0 by a file that it sees, and saves by its clock once
    `save_s` seconds have passed since the last save (0: never). Votes are summed while the next
    step runs, so that nobody waits for them.
    """

    SIGNALS = interrupt.SIGNALS

    def __init__(self, *files: Path, save_s: float = 0.0):
        self.files, self.heard, self.save_s = files, 0, save_s
        self.saved_at, self.outdated = time.monotonic(), False
        # On the CPU, and looked at through NumPy: neither device nor torch is asked.
        self.votes = torch.zeros(2)
        self.stop_save = self.votes.numpy()
        self.sum: td.Work | None = None
        interrupt.handle(self.hear)

    def hear(self, number: int, _: FrameType | None) -> None:
        """Take note of a signal, however often it comes.

        A launcher passes on what the terminal or Slurm has sent to the ranks as well (a Ctrl-C
        arrives as SIGINT and SIGTERM under deepspeed, as two SIGINT under torchrun): a repeated
        signal must not end them while they save. SIGKILL and SIGQUIT (Ctrl-\\) end a rank at once.
        """
        if not self.heard and rank() == 0:
            name = signal.Signals(number).name
            with suppress(OSError):  # not print: the signal may have interrupted one
                os.write(2, f"unic_ds: {name}: the run saves and stops after this step\n".encode())
        self.heard = number

    def close(self) -> None:
        """Let signals end the process again; Interrupted where one came too late to be heeded."""
        interrupt.install()
        if self.heard:
            raise interrupt.Interrupted(self.heard)

    def saved(self) -> None:
        """Start the clock anew after a save; every rank calls it, after the same step."""
        self.saved_at, self.outdated = time.monotonic(), True

    def agreed(self) -> Agreed:
        """What the votes were when all ranks last called this; every rank calls it at each step."""
        if self.sum is not None:
            self.sum.wait()
        stop, save = map(bool, self.stop_save)
        found = Agreed(stop, save and not self.outdated)  # a vote from before the last save
        self.outdated = False
        first = rank() == 0
        late = self.save_s and time.monotonic() - self.saved_at >= self.save_s
        self.stop_save[0] = bool(self.heard) or (first and any(map(Path.exists, self.files)))
        self.stop_save[1] = first and bool(late)
        self.sum = td.all_reduce(self.votes, async_op=True) if world() > 1 else None
        return found
