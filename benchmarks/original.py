"""Baselines: the released code's training step of a quantiser, the same vectorised in float32, and its whole step.

The quantisers search, compute the commitment terms and their gradients, update by sequential EMA and reset idle
codewords. They leave out code matching; the whole step has it.
"""

from collections.abc import Callable, Mapping
from itertools import combinations, product

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from unicode_fast.config import Config, Modality
from unicode_fast.modules import UniCode

DECAY, EPSILON, BETA = 0.99, 1e-5, 0.25
MI_STEPS, MI_RATE = 5, 1e-3
SELF_WEIGHT, MATCHING_WEIGHT = 0.1, 0.5
RESET_AFTER, ACTIVE_WITHIN, NOISE = 300, 100, 1 / 1024


class OriginalQuantiser:
    """The released code's algorithm: float64, one-hot matrices, Python loops over rows and codewords.

    Args:
        codebook: (M, D), the initial codewords.
        modalities: their number.
    """

    dtype = torch.float64

    def __init__(self, codebook: Tensor, modalities: int) -> None:
        self.codebook = codebook.to(self.dtype)
        self.sums = self.codebook.clone()
        self.counts = torch.zeros(len(codebook), dtype=self.dtype, device=codebook.device)
        self.idle = torch.full((len(codebook),), -1, dtype=torch.int64, device=codebook.device)
        self.modalities = modalities

    def step_on(self, features: list[Tensor]) -> Callable[[], Tensor]:
        """A function of one step on these rows, (N, D) by modality; it returns the codes of all rows."""
        rows = [x.to(self.dtype).clone().requires_grad_() for x in features]
        return lambda: self.step(rows)

    def search(self, rows: Tensor) -> Tensor:
        """Indices by expanded distances."""
        squares = self.codebook.square().sum(1) + rows.square().sum(1, keepdim=True)
        return torch.addmm(squares, rows, self.codebook.T, alpha=-2).argmin(1)

    def step(self, rows: list[Tensor]) -> Tensor:
        """One training step."""
        index, _, losses = self.forward(rows)
        torch.stack(losses).sum().backward()
        return torch.cat(index)

    def forward(self, rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Codes, codewords and commitment of each modality; updates the codebook."""
        detached = [x.detach() for x in rows]
        index = [self.search(x) for x in detached]
        hot = [F.one_hot(i, len(self.codebook)).to(self.dtype) for i in index]
        quantised = [h @ self.codebook for h in hot]
        partner = BETA / (self.modalities - 1)
        losses = [
            torch.stack(
                [(2 * BETA if own == other else partner) * F.mse_loss(x, q) for other, q in enumerate(quantised)]
            ).sum()
            for own, x in enumerate(rows)
        ]
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
        return index, quantised, losses

    def reset(self, index: list[Tensor]) -> None:
        """Resets idle codewords to others in use plus noise."""
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
        """Resets idle codewords to others in use plus noise."""
        self.idle += 1
        self.idle[torch.cat(index)] = 0
        active = ((self.idle >= 0) & (self.idle < ACTIVE_WITHIN)).to(self.dtype)
        source = torch.multinomial(active, len(self.idle), replacement=True)
        noise = torch.empty_like(self.codebook).uniform_(-NOISE, NOISE)
        dead = self.idle > RESET_AFTER
        self.codebook = torch.where(dead[:, None], self.codebook[source] + noise, self.codebook)
        self.idle = torch.where(dead, 0, self.idle)


class OriginalStep:
    """A whole training step of the released code, at the sizes of a configuration with the rules of `official`.

    The layers are those of the package. All else is float64, with the quantiser above and five inner steps of
    three networks with an optimiser each. Each pair of modalities has a contrast, and code matching is a loop over
    clips. Three unused classifiers and printed diagnostics are left out, which makes the step faster.

    Args:
        config: of preset official.
        modalities: kind and shape by name.
        device: of the training.
    """

    def __init__(self, config: Config, modalities: Mapping[str, Modality], device: torch.device) -> None:
        torch.manual_seed(config.train.seed)
        self.model = UniCode(modalities, config).to(device)
        self.groups = [*self.model.parameter_groups().values()]
        self.optimizer = torch.optim.Adam([parameter for group in self.groups for parameter in group])
        self.mi_optimizers = {
            name: torch.optim.Adam(network.parameters(), MI_RATE) for name, network in self.model.club.items()
        }
        self.quantiser = OriginalQuantiser(self.model.codebook.codebook, len(modalities))

    def train_step(self, features: Mapping[str, Tensor], mask: object, rate: float) -> dict[str, Tensor]:
        """Losses by name; the mask is not applied, so padded words count as words."""
        clips, positions = next(iter(features.values())).shape[:2]
        order = {name: torch.randperm(clips) for name in features}
        return self.step(features, int(torch.randint(1, positions - 1, ())), order, rate)

    def step(
        self, features: Mapping[str, Tensor], last: int, order: dict[str, Tensor], rate: float
    ) -> dict[str, Tensor]:
        """`train_step` with a given last position of Cross-CPC's context and given negatives of CLUB."""
        model, names = self.model.train(), self.model.names
        read, z, specific, club = {}, {}, {}, {}
        for name in names:
            read[name] = model.encoders[name].read_words(features[name])
            z[name] = model.encoders[name].encode_semantic(read[name])
            specific[name], club[name] = model.encoders[name].encode_specific(read[name])
        codebook = self.quantiser.codebook
        _, codewords, commitments = self.quantiser.forward([x.flatten(0, 1) for x in z.values()])
        terms = {f"commitment.{name}": loss for name, loss in zip(names, commitments, strict=True)}
        quantised = {
            name: z[name] + (codeword.view_as(z[name]) - z[name]).detach()
            for name, codeword in zip(names, codewords, strict=True)
        }
        for _ in range(MI_STEPS):
            for name, optimizer in self.mi_optimizers.items():
                mean, log_variance = model.club[name](quantised[name].detach())
                errors = -((mean - club[name].detach()) ** 2) / log_variance.exp() - log_variance
                optimizer.zero_grad()
                (-(errors / 2).sum(-1).mean()).backward()
                optimizer.step()
        for name in names:
            terms[f"club.{name}"] = self.mutual_information(name, quantised[name], club[name], order[name])
            decoded = model.decoders[name](quantised[name], specific[name])
            terms[f"reconstruction.{name}"] = F.mse_loss(decoded, read[name])
        terms["cpc"] = self.cross_prediction(z, last)
        shares = {name: torch.softmax(-self.distances(x, codebook), -1).mean(1) for name, x in z.items()}
        for first, second in combinations(names, 2):
            terms[f"code_matching.{first}-{second}"] = self.code_matching(shares[first], shares[second])
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        for group in self.groups:
            clip_grad_norm_(group, 0.5)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def mutual_information(self, name: str, x: Tensor, y: Tensor, order: Tensor) -> Tensor:
        """CLUB as released: over time first, then against one permutation of the clips."""
        mean, log_variance = self.model.club[name](x)
        spread = log_variance.mean(1).exp()
        positive = -((mean - y) ** 2).mean(1) / spread
        negative = -((mean - y[order]) ** 2).mean(1) / spread
        return (positive.sum(-1) - negative.sum(-1)).mean() / 2

    def cross_prediction(self, z: Mapping[str, Tensor], last: int) -> Tensor:
        """Cross-CPC, pair by pair, with the count of recognised clips."""
        cpc, losses = self.model.cpc, []
        for target, source in product(z, z):
            context = cpc.context[source](z[source][:, : last + 1])[0][:, -1]
            scores = z[target][:, last + 1] @ cpc.predictors[source][0](context).T
            loss = -torch.diag(F.log_softmax(scores, 1)).mean()
            losses.append((SELF_WEIGHT if target == source else 1.0) * loss)
            (scores.softmax(1).argmax(0) == torch.arange(len(scores), device=scores.device)).sum()
        return torch.stack(losses).sum()

    def distances(self, x: Tensor, codebook: Tensor) -> Tensor:
        """Euclidean distances, expanded: (B, T, D) to (B, T, M)."""
        rows = x.flatten(0, 1)
        squares = codebook.square().sum(1) + rows.square().sum(1, keepdim=True)
        return torch.addmm(squares, rows, codebook.T, alpha=-2).sqrt().view(*x.shape[:2], -1)

    def code_matching(self, first: Tensor, second: Tensor) -> Tensor:
        """Code matching, clip by clip."""
        scores = first @ (second + 1e-10).log().T + second @ (first + 1e-10).log().T
        exponential = (scores - scores.min()).exp()
        loss = torch.zeros((), dtype=first.dtype, device=first.device)
        for clip in range(len(first)):
            loss = loss - (exponential[clip, clip] / (exponential[clip].sum() + EPSILON)).log()
        return MATCHING_WEIGHT * loss / len(first)
