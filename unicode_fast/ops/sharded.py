"""A batch that the processes of a group hold in parts, one after the other: whole where each needs it, added up again.

Only all-reduce is used, which every backend of torch.distributed has for tensors of any sizes: a part in a field of
zeros adds up to the whole, exactly. A loss that all processes know is the sum of shares, and each goes back through
its own share alone, so the gradients of parameters that all hold add up to those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# Collectives that this process has begun. All call the same ones, so whoever has begun fewer is behind.
begun = 0


def begin() -> None:
    """Counts a collective; before each one."""
    global begun
    begun += 1


def all_reduce(tensor: Tensor, group: ProcessGroup | None) -> None:
    """Each element becomes its sum over the processes."""
    begin()
    dist.all_reduce(tensor, group=group)


class Part(NamedTuple):
    """Which clips of the batch this process holds: those from `offset` on, of `clips` in all."""

    offset: int
    clips: int
    group: ProcessGroup


def find_part(clips: int, device: torch.device, group: ProcessGroup) -> Part:
    """Ask all processes how many clips they hold; the host waits for the answer."""
    numbers = torch.zeros(group.size(), dtype=torch.int64, device=device)
    numbers[group.rank()] = clips
    all_reduce(numbers, group)
    before = numbers.tolist()
    return Part(sum(before[: group.rank()]), sum(before), group)


def gather(vectors: Tensor, part: Part, dim: int = 0) -> Tensor:
    """All processes' vectors, of which `dim` counts the clips, with the gradient of all of them."""
    whole: Tensor = _Gather.apply(vectors, part, dim)
    return whole


def add_up(share: Tensor, part: Part) -> Tensor:
    """Sum over the processes, which has the gradient of this one's share."""
    total: Tensor = _Sum.apply(share, part, False)
    return total


def total(share: Tensor, part: Part) -> Tensor:
    """Sum over the processes, each of which computes its own share of a loss from it: with the gradient of them all."""
    whole: Tensor = _Sum.apply(share, part, True)
    return whole


def largest(values: Tensor, part: Part) -> Tensor:
    """Elementwise maximum over the processes, without gradient."""
    found = values.detach().clone()
    begin()
    dist.all_reduce(found, dist.ReduceOp.MAX, group=part.group)
    return found


@torch.no_grad()
def add_up_gradients(parameters: Iterable[nn.Parameter], part: Part) -> None:
    """Each gradient becomes the sum over the processes, in one collective."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    all_reduce(whole, part.group)
    for gradient, added in zip(gradients, whole.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(added.view_as(gradient))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, part: Part, dim: int) -> Tensor:
        ctx.part, ctx.dim, ctx.own = part, dim, vectors.shape[dim]
        whole = vectors.new_zeros((*vectors.shape[:dim], part.clips, *vectors.shape[dim + 1 :]))
        whole.narrow(dim, part.offset, ctx.own).copy_(vectors)
        all_reduce(whole, part.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Half-precision shares are added in float32.
        added = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        all_reduce(added, ctx.part.group)
        return added.narrow(ctx.dim, ctx.part.offset, ctx.own).to(gradient.dtype), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, part: Part, of_all: bool) -> Tensor:
        ctx.part, ctx.of_all = part, of_all
        whole = share.clone(memory_format=torch.contiguous_format)
        all_reduce(whole, part.group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.of_all:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            all_reduce(gradient, ctx.part.group)
        return gradient, None, None
