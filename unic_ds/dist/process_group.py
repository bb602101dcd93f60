"""Start of the process group: store, check of the nodes, timeout, device of the rank."""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as td
from torch.distributed import distributed_c10d as c10d

from unic_ds import files
from unic_ds.dist.ranks import ALLOWED, cores, local_rank, local_world, rank, world
from unic_ds.process import console, node, rendezvous

TIMEOUT_S = 1800
REFUSAL_S = 300.0
"""Seconds that a rank of an unfit node waits for the others, so that all of them end."""
READ_S = 10.0
"""Seconds that rank 0 waits for the others to read the reason why all end."""


def start(timeout_s: int | None = None) -> None:
    """Join the process group of the launcher's environment; one of one rank without a launcher.

    No collective waits longer than `timeout_s` (1800). node.Unfit, on all ranks, if a node lacks
    GPUs that it should have, or if the ranks' devices or software differ.
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
    init_process_group("cpu:gloo,cuda:nccl" if facts.device == "cuda" else "gloo", facts, timeout_s)
    set_timeout(timeout_s)


def stop() -> None:
    """Destroy the process group."""
    if td.is_initialized():
        td.destroy_process_group()


def use_gpu() -> None:
    """Set this rank's GPU, its matmul precision, and its affinity to the CPU cores near the GPU."""
    torch.cuda.set_device(local_rank())
    # fp32 is computed in fp32, not TF32, and bf16 products are summed in fp32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    near = node.cores_near(local_rank(), ALLOWED)
    if len(near) >= cores():  # later threads inherit the affinity
        os.sched_setaffinity(0, near)


def init_process_group(backend: str, facts: node.Facts, timeout_s: int) -> None:
    """Connect to the store, check the nodes of all ranks, and make the group of all ranks."""
    if world() == 1 and "MASTER_PORT" not in os.environ:
        raise_unfit(*node.incompatibility([facts]))
        td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)
        return
    timeout, file = timedelta(seconds=timeout_s), rendezvous.port_file()
    try:
        store = store_at_free_port(file, timeout) if file else environment_store(timeout)
        check_nodes(td.PrefixStore("nodes", store), facts, timeout)
        td.init_process_group(
            backend,
            store=td.PrefixStore("default_pg", store),
            rank=rank(),
            world_size=world(),
            timeout=timeout,
        )
    except td.DistNetworkError as error:
        raise RuntimeError(
            f"the ranks cannot connect to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            f" ({str(error).split(':')[-1].strip()}); give the launcher another --master_port"
        ) from error
    if file:
        file.unlink(missing_ok=True)  # all are connected


def environment_store(timeout: timedelta) -> td.Store:
    """The store at the address that the launcher gives."""
    store, _, _ = next(td.rendezvous("env://", rank(), world(), timeout=timeout))
    store.set_timeout(timeout)
    return store


def store_at_free_port(file: Path, timeout: timedelta) -> td.Store:
    """A store at a free port of this machine, which rank 0 writes to `file` for the others.

    TimeoutError if rank 0 does not write it.
    """
    host = os.environ["MASTER_ADDR"]
    if rank() == 0:
        store = td.TCPStore(host, 0, world(), True, timeout, wait_for_workers=False)
        files.write_atomic(file, str(store.port))
        os.environ["MASTER_PORT"] = str(store.port)
        return store
    last = time.monotonic() + timeout.total_seconds()
    while not file.exists():
        if time.monotonic() > last:
            raise TimeoutError(f"rank 0 did not start within {timeout.total_seconds():.0f} s")
        time.sleep(0.05)
    os.environ["MASTER_PORT"] = files.read_text(file)
    return td.TCPStore(host, int(os.environ["MASTER_PORT"]), world(), False, timeout)


def check_nodes(store: td.Store, facts: node.Facts, timeout: timedelta) -> None:
    """Raise node.Unfit on all ranks if their nodes cannot train together; rank 0 compares them.

    A rank of an unfit node waits for the others for `REFUSAL_S` only.
    """
    limit = timedelta(seconds=REFUSAL_S) if facts.fault else timeout
    try:
        store.set(f"facts {rank()}", json.dumps(asdict(facts)))
        if rank() == 0:
            keys = [f"facts {number}" for number in range(world())]
            store.wait(keys, limit)
            rows = [node.Facts(**json.loads(store.get(key))) for key in keys]
            if warning := node.mixed_gpus(rows):
                console.say(f"warning: {warning}")
            store.set("verdict", json.dumps(node.incompatibility(rows)))
        store.wait(["verdict"], limit)
    except (td.DistStoreError, td.DistNetworkError) as error:
        raise_unfit(facts.fault, [facts.host])
        if isinstance(error, td.DistNetworkError):
            raise RuntimeError(
                "rank 0 ended before all ranks were connected; see its error message"
            ) from None
        raise TimeoutError(
            f"not all ranks started within {timeout.total_seconds():.0f} s"
        ) from None
    message, nodes = json.loads(store.get("verdict"))
    if not message:
        return
    store.add("read", 1)
    last = time.monotonic() + READ_S
    while rank() == 0 and store.add("read", 0) < world() and time.monotonic() < last:
        time.sleep(0.05)  # the store ends with this process
    raise_unfit(message, nodes)


def raise_unfit(message: str, nodes: Sequence[str]) -> None:
    """Raise node.Unfit if there is a message."""
    if message:
        raise node.Unfit(message, nodes)


def set_timeout(seconds: int) -> None:
    """Set one timeout for all process groups, existing and future.

    Groups that DeepSpeed and FSDP make have torch's default (30 minutes with gloo and NCCL), not
    that of the group of all ranks, and neither library passes a timeout on.
    """
    timeout = timedelta(seconds=seconds)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    change = getattr(td, "set_timeout", None) or c10d._set_pg_timeout  # since torch 2.14; before
    for group in list(c10d._world.pg_map):
        change(timeout, group)
