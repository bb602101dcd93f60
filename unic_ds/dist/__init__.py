"""Ranks and their communication: the only package that imports torch.distributed."""

from unic_ds.dist.collectives import (
    all_gather,
    all_gather_batch,
    all_gather_objects,
    all_reduce_sum,
    barrier,
    broadcast_object,
    gather_to_rank,
    local_main_first,
    on_rank_0,
)
from unic_ds.dist.process_group import REFUSAL_S, start, stop, use_gpu
from unic_ds.dist.ranks import cores, device, local_rank, local_world, rank, world
from unic_ds.dist.sharding import shard_over_node
from unic_ds.dist.step_votes import StepVotes

__all__ = [
    "REFUSAL_S",
    "StepVotes",
    "all_gather",
    "all_gather_batch",
    "all_gather_objects",
    "all_reduce_sum",
    "barrier",
    "broadcast_object",
    "cores",
    "device",
    "gather_to_rank",
    "local_main_first",
    "local_rank",
    "local_world",
    "on_rank_0",
    "rank",
    "shard_over_node",
    "start",
    "stop",
    "use_gpu",
    "world",
]
