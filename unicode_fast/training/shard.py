"""A rank's clips of a batch that ranks share, and the collectives of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def own_clips(clips: int, rank: int, ranks: int) -> slice:
    """Which clips of a batch a rank holds: as many as any other, or one more or less."""
    return slice(clips * rank // ranks, clips * (rank + 1) // ranks)


class Shard:
    """A rank's clips of a batch.

    Args:
        clips: of the whole batch.
        group: the ranks that share it.
    """

    def __init__(self, clips: int, group: ProcessGroup) -> None:
        self.group = group
        self.every = [own_clips(clips, rank, group.size()) for rank in range(group.size())]
        self.own = self.every[group.rank()]

    @torch.no_grad()
    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of all clips, (B, ...), from those of each rank's own, (b, ...), in one collective.

        Args:
            tensors: of the dtype of the first, or bool.
        """
        dtype = tensors[0].dtype
        rows = torch.cat([tensor.flatten(1).to(dtype) for tensor in tensors], 1)
        most = max(clips.stop - clips.start for clips in self.every)
        every = rows.new_empty(len(self.every) * most, rows.shape[1])
        blocks = list(every.split(most))
        dist.all_gather(blocks, pad(rows, (0, 0, 0, most - len(rows))), group=self.group)
        whole = torch.cat([block[: clips.stop - clips.start] for block, clips in zip(blocks, self.every, strict=True)])
        columns = whole.split([tensor[:1].numel() for tensor in tensors], 1)
        return [
            column.to(tensor.dtype).reshape(-1, *tensor.shape[1:])
            for column, tensor in zip(columns, tensors, strict=True)
        ]

    @torch.no_grad()
    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the ranks, in one collective."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients that every rank has computed alike stay alike to the last bit."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for gradient in gradients:
            gradient /= len(self.every)
        self.all_reduce_sum(gradients)
