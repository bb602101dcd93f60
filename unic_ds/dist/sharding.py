"""Frozen modules sharded over the ranks of a node by FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from unic_ds.dist.process_group import start
from unic_ds.dist.ranks import device, local_world, world


def shard_over_node(module: nn.Module, blocks: Sequence[nn.Module], *, offload: bool) -> None:
    """Shard a frozen module's weights over the ranks of the node, by FSDP2.

    A block's weights are gathered for its forward, the others for the module's. `offload` keeps the
    shards in the CPU's memory. Every rank of the node calls this, and then each forward.
    """
    from torch.distributed.fsdp import (  # the import takes a second; most commands need none
        CPUOffloadPolicy,
        OffloadPolicy,
        fully_shard,
    )

    start()
    cuda = device().type == "cuda"
    policy = CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy()
    for part in (*blocks, module):
        fully_shard(part, mesh=node_mesh(), reshard_after_forward=True, offload_policy=policy)


@cache
def node_mesh() -> DeviceMesh:
    """Mesh of the ranks of this node; made once, since every mesh makes new communicators."""
    inside = local_world() if world() % local_world() == 0 else world()
    shape, names = (world() // inside, inside), ("nodes", "node")
    return init_device_mesh(device().type, shape, mesh_dim_names=names)["node"]
