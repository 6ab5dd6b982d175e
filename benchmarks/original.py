"""Baselines of a quantiser's training step: as the released code computes it, and the same vectorised in float32.

Both search, take the commitment terms and their gradients, update by sequential EMA and reset idle codewords; code
matching is left out, as it is from the step they are compared with.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

DECAY, EPSILON, BETA = 0.99, 1e-5, 0.25
RESET_AFTER, ACTIVE_WITHIN, NOISE = 300, 100, 1 / 1024


class OriginalQuantiser:
    """The released code's way: float64, one-hot matrices, Python loops over rows and codewords that read each number.

    Args:
        codebook: (M, D), the start.
        modalities: how many.
    """

    dtype = torch.float64

    def __init__(self, codebook: Tensor, modalities: int) -> None:
        self.codebook = codebook.to(self.dtype)
        self.sums = self.codebook.clone()
        self.counts = torch.zeros(len(codebook), dtype=self.dtype, device=codebook.device)
        self.idle = torch.full((len(codebook),), -1, dtype=torch.int64, device=codebook.device)
        self.modalities = modalities

    def step_on(self, features: list[Tensor]) -> Callable[[], Tensor]:
        """The step on these rows, (N, D) by modality; it returns the codes of all rows."""
        rows = [x.to(self.dtype).clone().requires_grad_() for x in features]
        return lambda: self.step(rows)

    def search(self, rows: Tensor) -> Tensor:
        """Indices by expanded distances."""
        squares = self.codebook.square().sum(1) + rows.square().sum(1, keepdim=True)
        return torch.addmm(squares, rows, self.codebook.T, alpha=-2).argmin(1)

    def step(self, rows: list[Tensor]) -> Tensor:
        """One training step."""
        detached = [x.detach() for x in rows]
        index = [self.search(x) for x in detached]
        hot = [F.one_hot(i, len(self.codebook)).to(self.dtype) for i in index]
        quantised = [h @ self.codebook for h in hot]
        partner = BETA / (self.modalities - 1)
        losses = []
        for own, x in enumerate(rows):
            for other, q in enumerate(quantised):
                losses.append((2 * BETA if own == other else partner) * F.mse_loss(x, q))
        torch.stack(losses).sum().backward()
        for own, h in enumerate(hot):
            self.counts = DECAY * self.counts + (1 - DECAY) * h.sum(0)
            total = self.counts.sum()
            self.counts = (self.counts + EPSILON) / (total + len(self.codebook) * EPSILON) * total
            mixed = sum(
                (0.5 if other == own else 0.5 / (self.modalities - 1)) * (h.T @ x) for other, x in enumerate(detached)
            )
            self.sums = DECAY * self.sums + (1 - DECAY) * mixed
            self.codebook = self.sums / self.counts.unsqueeze(1)
        self.reset(index)
        return torch.cat(index)

    def reset(self, index: list[Tensor]) -> None:
        """Idle codewords become others in use plus noise."""
        self.idle += 1
        for codes in index:
            for code in codes:
                self.idle[code.item()] = 0
        active = [k for k in range(len(self.idle)) if 0 <= self.idle[k].item() < ACTIVE_WITHIN]
        for k in range(len(self.idle)):
            if self.idle[k].item() > RESET_AFTER:
                source = active[int(torch.randint(len(active), ()))]
                self.codebook[k] = self.codebook[source] + torch.empty_like(self.codebook[k]).uniform_(-NOISE, NOISE)
                self.idle[k] = 0


class PlainQuantiser(OriginalQuantiser):
    """The same rules without loops, in float32."""

    dtype = torch.float32

    def reset(self, index: list[Tensor]) -> None:
        """Idle codewords become others in use plus noise."""
        self.idle += 1
        self.idle[torch.cat(index)] = 0
        active = ((self.idle >= 0) & (self.idle < ACTIVE_WITHIN)).to(self.dtype)
        source = torch.multinomial(active, len(self.idle), replacement=True)
        noise = torch.empty_like(self.codebook).uniform_(-NOISE, NOISE)
        dead = self.idle > RESET_AFTER
        self.codebook = torch.where(dead[:, None], self.codebook[source] + noise, self.codebook)
        self.idle = torch.where(dead, 0, self.idle)


class OriginalStep: ...
