"""A batch that the processes of a group hold in parts, one after the other: whole where each needs it, added up again.

Only all-reduce is used, which every backend of torch.distributed has for tensors of any sizes: a part in a field of
zeros adds up to the whole, exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Part(NamedTuple):
    """Which clips of the batch this process holds: those from `offset` on, of `clips` in all."""

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


def gather(vectors: Tensor, part: Part) -> Tensor:
    """All processes' (modalities, K, own clips, ...) as (modalities, K, B, ...), with the gradient of all of them."""
    whole: Tensor = _Gather.apply(vectors, part)
    return whole


def add_up(share: Tensor, part: Part) -> Tensor:
    """Sum over the processes, which has the gradient of this one's share."""
    total: Tensor = _Sum.apply(share, part)
    return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, part: Part) -> Tensor:
        ctx.part, ctx.own = part, vectors.shape[2]
        whole = vectors.new_zeros((*vectors.shape[:2], part.clips, *vectors.shape[3:]))
        whole[:, :, part.offset : part.offset + ctx.own] = vectors
        dist.all_reduce(whole, group=part.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Half-precision shares are added in float32.
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.part.group)
        return total[:, :, ctx.part.offset : ctx.part.offset + ctx.own].to(gradient.dtype), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, part: Part) -> Tensor:
        total = share.clone()
        dist.all_reduce(total, group=part.group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
