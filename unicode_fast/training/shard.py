"""The clips of a rank in a batch that ranks share, and the collectives of a training step."""

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
    """The clips of a batch that a rank holds; ranks hold equally many, or one more or less."""
    return slice(clips * rank // ranks, clips * (rank + 1) // ranks)


class Shard:
    """The clips of a rank in a batch.

    Args:
        clips: number of clips of the whole batch.
        group: the ranks that share it.
    """

    def __init__(self, clips: int, group: ProcessGroup) -> None:
        self.group = group
        self.slices = [own_clips(clips, rank, group.size()) for rank in range(group.size())]
        self.own = self.slices[group.rank()]

    @torch.no_grad()
    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Concatenates tensors (b, ...) of each rank to those of the whole batch, (B, ...), in one collective.

        Args:
            tensors: of the dtype of the first, or bool.
        """
        rows = torch.cat([tensor.flatten(1).to(tensors[0].dtype) for tensor in tensors], 1)
        sizes = [clips.stop - clips.start for clips in self.slices]
        # Equally many rows from each rank, as the collective needs.
        padded = pad(rows, (0, 0, 0, max(sizes) - len(rows)))
        blocks = list(rows.new_empty(len(sizes) * len(padded), rows.shape[1]).split(len(padded)))
        dist.all_gather(blocks, padded, group=self.group)
        whole = torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])
        columns = whole.split([tensor[:1].numel() for tensor in tensors], 1)
        return [
            column.to(tensor.dtype).reshape(len(column), *tensor.shape[1:])
            for column, tensor in zip(columns, tensors, strict=True)
        ]

    @torch.no_grad()
    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, in one collective."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages gradients over the ranks. All ranks compute the same; their average is equal to the last bit."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for gradient in gradients:
            gradient /= len(self.slices)
        self.all_reduce_sum(gradients)
