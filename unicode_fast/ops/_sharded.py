"""Gathering of a batch whose clips are sharded over the processes of a group, for operators that take a `group`.

The functions use only all-reduce, which every backend of torch.distributed has for tensors of any size. Shards padded
with zeros add up to the batch exactly. A loss is the sum of the processes' shares, and each process differentiates only
its own share. So the gradients of shared parameters add up to those of the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """The clips of this process start at `offset` in the batch of `clips` clips."""

    offset: int
    clips: int
    group: ProcessGroup


def find_shard(clips: int, device: torch.device, group: ProcessGroup) -> Shard:
    """All-reduce the number of clips of each process; the CPU waits for the result."""
    numbers = torch.zeros(group.size(), dtype=torch.int64, device=device)
    numbers[group.rank()] = clips
    dist.all_reduce(numbers, group=group)
    before = numbers.tolist()
    return Shard(sum(before[: group.rank()]), sum(before), group)


def gather(vectors: Tensor, shard: Shard, dim: int = 0) -> Tensor:
    """The vectors of all processes, concatenated along `dim`; the gradient adds up over processes."""
    whole: Tensor = _Gather.apply(vectors, shard, dim)
    return whole


def all_reduce_sum(share: Tensor, shard: Shard) -> Tensor:
    """Sum over the processes, with the gradient of this process's share."""
    total: Tensor = _Sum.apply(share, shard)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, shard: Shard, dim: int) -> Tensor:
        ctx.shard, ctx.dim, ctx.own = shard, dim, vectors.shape[dim]
        whole = vectors.new_zeros((*vectors.shape[:dim], shard.clips, *vectors.shape[dim + 1 :]))
        whole.narrow(dim, shard.offset, ctx.own).copy_(vectors)
        dist.all_reduce(whole, group=shard.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Half-precision shares are added in float32.
        added = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        dist.all_reduce(added, group=ctx.shard.group)
        return added.narrow(ctx.dim, ctx.shard.offset, ctx.own).to(gradient.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, shard: Shard) -> Tensor:
        whole = share.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=shard.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
