"""The optimiser of a training step: clipping and Adam, in one operator on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from unicode_fast.modules import host


class ClippedAdam(torch.optim.Adam):
    """`torch.optim.Adam` that first clips the gradients of each group to a norm, with the same state.

    On a CPU in float32 one operator does both and leaves the gradients as they are; elsewhere torch's functions do.

    Args:
        groups: of parameters that are clipped together.
        rate: the learning rate; a tensor for a CUDA graph.
        most_norm: the largest norm of a group's gradients; infinity clips none.
        capturable: as in torch.
    """

    def __init__(
        self,
        groups: Iterable[Iterable[Parameter]],
        rate: float | Tensor,
        most_norm: float = math.inf,
        capturable: bool = False,
    ) -> None:
        self.clipped, self.most_norm = [list(group) for group in groups], most_norm
        parameters = [parameter for group in self.clipped for parameter in group]
        # A group in a dictionary may be empty, as that of a model without CLUB.
        super().__init__([{"params": parameters}], rate, fused=True, capturable=capturable)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Clips and updates the parameters that have a gradient; see `torch.optim.Adam.step` without a closure."""
        if closure is not None:
            raise ValueError("closure must be None: a training step has gradients before it clips them")
        groups = [[parameter for parameter in group if parameter.grad is not None] for group in self.clipped]
        parameters = [parameter for group in groups for parameter in group]
        first = parameters[:1]
        alike = all((one.device, one.dtype) == (first[0].device, first[0].dtype) for one in parameters)
        if not (alike and all(map(host.has_operators, first))):
            for group in groups:
                if self.most_norm < math.inf:
                    clip_grad_norm_(group, self.most_norm)
            super().step()
            return
        options, states = self.param_groups[0], [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                state.update({"step": torch.zeros(()), **moments})
        torch.ops.unicode_fast_layers.clip_and_adam(
            parameters,
            [parameter.grad for parameter in parameters],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
            [len(group) for group in groups],
            self.most_norm,
            float(options["lr"]),
            *options["betas"],
            options["eps"],
        )
