"""Clips that the processes of a group hold in parts, one after the other, for operators that take a `group`.

Only all-reduce is used, which every backend of torch.distributed has for tensors of any sizes: a part in a field of
zeros adds up to the whole, exactly. A loss that all processes know is the sum of shares, and each goes back through
its own share alone, so the gradients of parameters that all hold add up to those of the whole batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Part(NamedTuple):
    """Which of the clips this process holds: those from `offset` on, of `clips` in all."""

    offset: int
    clips: int
    group: ProcessGroup


def find_part(clips: int, device: torch.device, group: ProcessGroup) -> Part:
    """Ask all processes how many clips they hold; the host waits for the answer."""
    numbers = torch.zeros(group.size(), dtype=torch.int64, device=device)
    numbers[group.rank()] = clips
    dist.all_reduce(numbers, group=group)
    before = numbers.tolist()
    return Part(sum(before[: group.rank()]), sum(before), group)


def gather(vectors: Tensor, part: Part, dim: int = 0) -> Tensor:
    """All processes' vectors, of which `dim` counts the clips, with the gradient of all of them."""
    whole: Tensor = _Gather.apply(vectors, part, dim)
    return whole


def add_up(share: Tensor, part: Part) -> Tensor:
    """Sum over the processes, which has the gradient of this one's share."""
    total: Tensor = _Sum.apply(share, part)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, part: Part, dim: int) -> Tensor:
        ctx.part, ctx.dim, ctx.own = part, dim, vectors.shape[dim]
        whole = vectors.new_zeros((*vectors.shape[:dim], part.clips, *vectors.shape[dim + 1 :]))
        whole.narrow(dim, part.offset, ctx.own).copy_(vectors)
        dist.all_reduce(whole, group=part.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Half-precision shares are added in float32.
        added = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        dist.all_reduce(added, group=ctx.part.group)
        return added.narrow(ctx.dim, ctx.part.offset, ctx.own).to(gradient.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, part: Part) -> Tensor:
        whole = share.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=part.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
